"""The HTTP edge of a worker: from a client's socket to the pipeline, and back byte by byte."""
