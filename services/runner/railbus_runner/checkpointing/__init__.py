"""Checkpoints of a trainer: what they hold, when they are written, how they are committed, proven and read."""
