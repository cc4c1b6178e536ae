"""The compiler: what each pass does, and that what comes out is right."""
