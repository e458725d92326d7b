"""Houses to be broken: the acceptance tests' own, one a test."""

from tests.acceptance.conftest import open_house

__all__ = ["open_house"]
