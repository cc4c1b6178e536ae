"""Compile a language model once, for every length, into kernels that you own."""
