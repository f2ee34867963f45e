"""Other loaders, measured side by side with ours in an environment of their own (`make bench-peers`)."""
