"""Finding what is wrong: planted errors are found where they are, and nowhere else."""
