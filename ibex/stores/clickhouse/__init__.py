"""ClickHouse: the traces, how they get there once, and how they are read."""
