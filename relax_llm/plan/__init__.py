"""Plans: which kernel serves which sizes."""
