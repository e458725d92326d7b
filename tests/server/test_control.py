"""The channel between the supervisor and a child, over a real socket pair."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ibex.server.control import Control
from ibex.server.messages import (
    MAX_WAITING_BYTES,
    Adopt,
    AnyMessage,
    Channel,
    Drain,
    MetricsAnswer,
    MetricsQuestion,
    Ready,
    Release,
    Report,
    Share,
    StatusAnswer,
    StatusQuestion,
)
from ibex.telemetry import Metrics, render_metrics

Pair = tuple[Control, Channel, "asyncio.Queue[AnyMessage]"]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A child's control, the supervisor's end, and what the supervisor hears."""
    ours, theirs = socket.socketpair()
    heard: asyncio.Queue[AnyMessage] = asyncio.Queue()
    channel = await Channel.open(ours, heard.put_nowait, lambda: None)
    control = Control(Metrics())
    await control.connect(theirs.detach())
    yield control, channel, heard
    await control.close()
    await channel.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (the condition is another's state)
            await asyncio.sleep(0.001)


async def test_what_a_child_says_arrives_in_order(pair: Pair) -> None:
    control, _, heard = pair

    control.ready(port=8080)
    control.share(b"payload", key=b"key")
    control.share(b"its own key")
    control.report()

    assert await heard.get() == Ready({"port": 8080})
    assert await heard.get() == Share(b"key", b"payload")
    assert await heard.get() == Share(b"its own key", b"its own key")
    assert isinstance(await heard.get(), Report)


async def test_orders_reach_the_callbacks(pair: Pair) -> None:
    control, channel, _ = pair
    orders: list[object] = []
    control.on_adopt = lambda slot: orders.append(("adopt", slot))
    control.on_release = lambda slot: orders.append(("release", slot))
    control.on_drain = lambda seconds: orders.append(("drain", seconds))

    channel.send(Adopt(1))
    channel.send(Release(1))
    channel.send(Drain(2.5))
    await eventually(lambda: len(orders) == 3)

    assert orders == [("adopt", 1), ("release", 1), ("drain", 2.5)]


async def test_what_was_shared_before_anybody_listened_is_heard_when_somebody_does(pair: Pair) -> None:
    control, channel, _ = pair
    drained = asyncio.Event()
    control.on_drain = lambda _: drained.set()
    heard: list[bytes] = []

    channel.send(Share(b"1", b"first"))
    channel.send(Drain(0))
    await drained.wait()
    control.on_share = heard.append
    channel.send(Share(b"2", b"second"))
    await eventually(lambda: len(heard) == 2)

    assert heard == [b"first", b"second"]


@pytest.mark.parametrize(
    ("ask", "question", "answer", "expected"),
    [
        (Control.metrics_text, MetricsQuestion, lambda n: MetricsAnswer(n, b"of the node"), b"of the node"),
        (Control.node_status, StatusQuestion, lambda n: StatusAnswer(n, {"pid": 1}), {"pid": 1}),
    ],
)
async def test_a_question_gets_its_own_answer(
    pair: Pair,
    ask: Callable[[Control], Awaitable[object]],
    question: type[MetricsQuestion | StatusQuestion],
    answer: Callable[[int], AnyMessage],
    expected: object,
) -> None:
    control, channel, heard = pair
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(ask(control))  # type: ignore[arg-type]
        while not isinstance(message := await heard.get(), question):
            pass
        channel.send(answer(message.number + 1000))
        channel.send(answer(message.number))

    assert asked.result() == expected


async def test_a_child_whose_supervisor_is_silent_shows_its_own_metrics(pair: Pair) -> None:
    control, _, _ = pair

    assert b"ibex_proxy_requests_total" in await control.metrics_text()
    assert await control.node_status() == {}


async def test_a_control_without_a_supervisor_serves_alone() -> None:
    metrics = Metrics()
    control = Control(metrics)

    control.share(b"nobody hears")
    control.report()

    assert await control.metrics_text() == render_metrics([metrics.snapshot()])
    assert await control.node_status() == {}
    await control.close()


async def test_the_death_of_the_supervisor_is_an_order_to_drain(pair: Pair) -> None:
    control, channel, _ = pair
    orders: list[float | None] = []
    control.on_drain = orders.append

    await channel.close()
    await eventually(lambda: bool(orders))

    assert orders == [None]


async def test_the_last_report_arrives_although_the_child_closes(pair: Pair) -> None:
    control, _, heard = pair

    await control.close()

    assert isinstance(await heard.get(), Report)


async def test_what_can_be_spared_is_dropped_when_the_far_side_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    channel = await Channel.open(ours, lambda _: None, lambda: None)
    share = Share(b"key", b"x" * (1 << 20))

    sent = [channel.offer(share) for _ in range(20)]

    assert sent[0]
    assert not sent[-1]
    assert sum(sent) << 20 <= MAX_WAITING_BYTES + (2 << 20)
    theirs.close()
    await channel.close()


async def test_a_frame_too_long_to_be_one_ends_the_channel() -> None:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    channel = await Channel.open(ours, lambda _: None, lost.set)

    theirs.sendall(b"\xff\xff\xff\xff")
    await asyncio.wait_for(lost.wait(), 5)

    theirs.close()
    await channel.close()


async def test_frames_are_read_whatever_their_pieces() -> None:
    ours, theirs = socket.socketpair()
    heard: list[AnyMessage] = []
    channel = await Channel.open(ours, heard.append, lambda: None)
    sender_end, raw = socket.socketpair()
    sender = await Channel.open(sender_end, lambda _: None, lambda: None)
    sender.send(Share(b"k", b"p" * 300))
    sender.send(Drain(1))
    await sender.close()
    frames = raw.recv(4096)

    for at in range(len(frames)):
        theirs.send(frames[at : at + 1])
        await asyncio.sleep(0)
    await eventually(lambda: len(heard) == 2)

    assert heard == [Share(b"k", b"p" * 300), Drain(1)]
    for sock in (theirs, raw):
        sock.close()
    await channel.close()
