"""Ahead of time: artifacts in processes without the compiler, without Python, and for other machines."""
