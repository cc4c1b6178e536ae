"""Kernels on their own, listings, recordings and repros."""
