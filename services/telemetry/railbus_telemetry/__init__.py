"""Every event on disk once."""
