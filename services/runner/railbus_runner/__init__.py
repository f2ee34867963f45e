"""Attempts: starts trainers, feeds them, commits their checkpoints."""
