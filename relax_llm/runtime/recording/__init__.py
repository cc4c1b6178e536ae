"""Launches of a run in a file: recorded with all that went in and came out, and made again alone."""
