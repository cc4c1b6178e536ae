"""The documentation: every example runs, every link leads somewhere, what is copied from the code is what it says."""
