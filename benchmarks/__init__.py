"""What is measured: scripts that anyone can run, each side by side with the alternatives."""
