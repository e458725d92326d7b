"""What ibex is about, in plain Python: no I/O, no framework, no settings."""
