"""Datasets: their index, their payloads, their order. NumPy only."""
