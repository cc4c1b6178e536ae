"""The passes, one a file, each a function from module to module."""
