"""Commands, errors, files and processes."""
