"""Generated message classes; see `packaging/generate_protos.py`."""
