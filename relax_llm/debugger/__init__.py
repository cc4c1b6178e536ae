"""The debugger of kernels: commands that act on a stepped run, over a full screen or over lines of text."""
