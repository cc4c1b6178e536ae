"""The benchmarks' own arithmetic, and that they run."""
