"""The embedded default: real PostgreSQL, Valkey and ClickHouse from wheels, run as children of this process."""
