"""Sources of datasets: one module for each thing that can be imported, all behind the Protocol in `source.py`."""
