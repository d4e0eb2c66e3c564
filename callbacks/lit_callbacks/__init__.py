"""Lightning callbacks, one behaviour per file."""
