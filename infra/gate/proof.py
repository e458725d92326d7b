"""What a line of the gate is, and what comes of proving it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from infra.gate.site import Site


class Status(StrEnum):
    """How a line stands."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    PENDING = "pending"
    """Not seen here, or a person's to do: signed off by nobody, and no failure."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen of one line."""

    status: Status
    how: str
    """What was done to see it."""
    figure: str
    """What was seen, in figures where there are any."""


def judge(is_met: bool, how: str, figure: str) -> Proof:
    """A proof of something that was seen: met or not."""
    return Proof(Status.PASS if is_met else Status.FAIL, how, figure)


@dataclass(frozen=True, slots=True)
class HouseLine:
    """A line that is asked of the running house."""

    area: str
    title: str
    prove: Callable[[Site], Awaitable[Proof]]


@dataclass(frozen=True, slots=True)
class LoneLine:
    """A line that needs no house, or has one of its own; proved when the gate's house has stopped."""

    area: str
    title: str
    prove: Callable[[], Awaitable[Proof]]


Line = HouseLine | LoneLine


@dataclass(frozen=True, slots=True)
class Result:
    """A line and its proof."""

    line: Line
    proof: Proof
