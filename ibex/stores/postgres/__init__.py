"""Postgres: who there is, what is in force, and what was said; the only place that speaks its SQL."""
