"""A copy of the store of a running NATS in a folder, and back."""
