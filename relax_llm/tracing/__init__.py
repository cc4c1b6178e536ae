"""Traces: when each launch of a run began, how long it took, and what the machine could have done."""
