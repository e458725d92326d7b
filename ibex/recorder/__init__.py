"""One process a node that takes finished turns from the journal to Postgres and ClickHouse, each once to each."""

from ibex.recorder.recorder import Recorder

__all__ = ["Recorder"]
