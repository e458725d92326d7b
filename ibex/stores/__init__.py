"""The only place that speaks SQL, Lua or ClickHouse, and the journal."""
