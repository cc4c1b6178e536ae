"""Architectures compared with transformers."""
