"""Formats that a dataset can be written in: one module for each, all behind the Protocol in `exporter.py`."""
