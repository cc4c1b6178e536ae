"""Tuning: measure the kernels that can serve a model's problems, and plan by what was measured."""
