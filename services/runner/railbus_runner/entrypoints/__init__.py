"""The entrypoints that come with railbus, and how the name of one becomes a function."""
