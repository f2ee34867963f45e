"""Checkpoints looked at from their files alone: found, proven, compared, exported, thinned out. No bus and no torch."""
