"""What can serve a problem: one file for each operator."""
