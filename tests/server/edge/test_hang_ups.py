"""A client that hangs up, whatever its request is waiting for: the provider's socket is closed within 100 ms."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from ibex.domain.turns import Outcome
from tests.server.conftest import Edge
from tests.waiting import eventually

PROMISED_SECONDS = 0.1
FOR_THE_CLIENT = "for a client that reads nothing"
TIMES = 3
"""The median counts: a busy machine may hold one of them up."""

WAITING: dict[str, dict[str, Any]] = {
    "for the head": {"controls": {"delay_ms": 60_000}},
    "for the rest of a reply": {"controls": {"hang_after": 10}},
    "for the head of a stream": {"controls": {"delay_ms": 60_000}, "stream": True},
    "between two events": {"controls": {"events": 5, "hang_after": 3}, "stream": True},
    "for nothing, amid many events": {"controls": {"events": 100_000, "gap_ms": 1}, "stream": True},
    FOR_THE_CLIENT: {"controls": {"events": 4000, "event_bytes": 65_536}, "stream": True},
}


def finish(client: socket.socket) -> None:
    client.close()


def half_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("hang_up", [finish, half_close, reset])
async def test_a_hang_up_ends_the_call_within_100_ms(
    edge: Edge, hang_up: Callable[[socket.socket], None], subtests: pytest.Subtests
) -> None:
    for name, waiting in WAITING.items():
        if (name, hang_up) == (FOR_THE_CLIENT, half_close):
            continue  # it has not hung up: it may still read, for as long as slow clients may
        with subtests.test(name):
            before = len(edge.turns())
            took = [await hang_up_once(edge, hang_up, **waiting) for _ in range(TIMES)]
            assert median(took) < PROMISED_SECONDS, took
            await eventually(lambda before=before: len(edge.turns()) == before + TIMES)
            turn, has_begun = edge.last_turn(), waiting.get("stream") and "delay_ms" not in waiting["controls"]
            assert (turn.outcome, turn.has_checkpoint) == (Outcome.CLIENT_DISCONNECT, bool(has_begun))
            assert turn.status_code == (200 if has_begun else 499)


async def hang_up_once(
    edge: Edge, hang_up: Callable[[socket.socket], None], *, controls: dict[str, Any], stream: bool = False
) -> float:
    """Ask, hang up once the provider is at it; seconds until its socket was closed."""
    client = socket.create_connection(("127.0.0.1", edge.port))
    body = {**edge.body, "stream": stream, "metadata": {"sandbox": controls}}
    asked = edge.sandbox.requests.total
    client.sendall(edge.raw_request(json.dumps(body).encode()))
    await eventually(lambda: edge.sandbox.requests.total > asked)
    await asyncio.sleep(0.05)  # until it waits for what it is to wait for
    entry = edge.sandbox.requests[-1]
    assert entry.ended is None
    hung_up_at = time.time()
    hang_up(client)
    await eventually(lambda: entry.ended is not None)
    client.close()
    assert (entry.ended, entry.ended_at is not None) == ("client_disconnect", True)
    return (entry.ended_at or 0.0) - hung_up_at


@pytest.mark.parametrize("edge", [{"provider_retries": 3}], indirect=True)
async def test_a_hang_up_between_two_attempts_ends_them(edge: Edge) -> None:
    client = socket.create_connection(("127.0.0.1", edge.port))
    body = {**edge.body, "metadata": {"sandbox": {"status": 503, "retry_after": "1"}}}
    client.sendall(edge.raw_request(json.dumps(body).encode()))
    await eventually(lambda: len(edge.sandbox.requests) == 1)
    await asyncio.sleep(0.05)
    client.close()
    await eventually(edge.turns)
    assert (edge.last_turn().outcome, edge.last_turn().status_code) == (Outcome.CLIENT_DISCONNECT, 499)
    await asyncio.sleep(1.2)
    assert len(edge.sandbox.requests) == 1
