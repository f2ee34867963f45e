"""Datasets: validated, verified and opened for trainers."""
