"""The edge under attack: one worker in this process."""

from tests.server.conftest import edge

__all__ = ["edge"]
