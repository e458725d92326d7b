"""ibex: an LLM proxy toolkit for people who run agents in production."""

__version__ = "0.2.0"
