"""Bars and lines of characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibexctl.charts import bar, sparkline


@pytest.mark.parametrize(
    ("value", "shown"), [(0, ""), (8, "████████"), (4, "████"), (0.001, "▏"), (1.5, "█▌"), (9, "████████"), (-1, "")]
)
def test_a_bar_is_as_long_as_its_share_and_never_longer_than_its_place(value: float, shown: str) -> None:
    assert bar(value, 8, 8) == shown


def test_a_bar_of_nothing_is_nothing() -> None:
    assert bar(1, 0, 8) == ""


def test_a_line_has_a_block_for_each_value_and_a_gap_where_there_is_nothing() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▂▅█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""


@given(st.lists(st.floats(0, 1e12), max_size=50))
def test_a_line_is_as_long_as_its_values(values: list[float]) -> None:
    assert len(sparkline(values)) == len(values)
