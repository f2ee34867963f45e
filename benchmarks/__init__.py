"""Benchmarks: each measures railbus and a peer, or a physical limit, side by side in one run, and tells the ratio."""
