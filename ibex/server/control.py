"""A child's end of the channel to its supervisor: readiness, metrics, shared fills, listening sockets, drain."""

import asyncio
import itertools
import socket
from collections.abc import Callable
from typing import Any, Protocol

from ibex.server.handover import Handover
from ibex.server.messages import (
    Adopt,
    AnyMessage,
    Channel,
    Drain,
    Failed,
    MetricsAnswer,
    MetricsQuestion,
    Ready,
    Release,
    Report,
    Share,
    StatusAnswer,
    StatusQuestion,
    Unfinished,
    Withdraw,
)
from ibex.telemetry import render_metrics

REPORT_SECONDS = 1.0
REPORTS_PER_TASK_COUNT = 10
"""Counting takes milliseconds at ten thousand connections, and the loop stands still for it."""
ANSWER_SECONDS = 0.5


class SnapshotSource(Protocol):
    """Whatever knows this process's metrics (`ibex.telemetry.Metrics`)."""

    def snapshot(self) -> bytes:
        """All samples of this process, in the form `render_metrics` sums up."""
        ...


class Control:
    """The supervisor, as a child sees it.

    Callbacks run on the event loop. Until `connect` is called there is no supervisor (tests serve so): questions are
    answered from this process alone, and what is shared goes nowhere.
    """

    def __init__(self, metrics: SnapshotSource, handover: Handover | None = None) -> None:
        self.handover = handover
        """A worker's way to give connections to its successor."""
        self._metrics = metrics
        self._channel: Channel | None = None
        self._numbers = itertools.count()
        self._reports = itertools.count()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._unheard: list[bytes] = []
        self._on_share: Callable[[bytes], None] | None = None
        self.read_facts: Callable[[], dict[str, Any]] = dict
        """Facts about this process that `ibexctl status` shows; they travel with the metrics, once a second."""
        self.on_adopt: Callable[[int], None] = lambda _slot: None
        self.on_release: Callable[[int], None] = lambda _slot: None
        self.on_withdraw: Callable[[], None] = lambda: None
        self.on_drain: Callable[[float | None], None] = lambda _seconds: None
        """Called with the seconds there are, or with None when the supervisor has died."""
        self.has_successor = False
        """Whether, this process draining, another one serves in its place already."""

    async def connect(self, fd: int) -> None:
        """Take over the inherited socket `fd`."""
        self._channel = await Channel.open(socket.socket(fileno=fd), self._receive, self._lose)

    @property
    def on_share(self) -> Callable[[bytes], None] | None:
        """Called with each payload another worker of this node shared, first those from before this one's start."""
        return self._on_share

    @on_share.setter
    def on_share(self, callback: Callable[[bytes], None] | None) -> None:
        self._on_share = callback
        unheard, self._unheard = self._unheard, []
        for payload in unheard:
            self._hear(payload)

    def share(self, payload: bytes, *, key: bytes | None = None) -> None:
        """Give a payload to the node's other workers and to those that start later; never waits, may be dropped.

        A later payload with the same `key` replaces this one for those that start later; without a key a payload is
        its own. It is kept in memory only.
        """
        if self._channel is not None:
            self._channel.offer(Share(payload if key is None else key, payload))

    async def metrics_text(self) -> bytes:
        """The whole node's metrics as Prometheus text; this process's alone when the supervisor does not answer."""
        if self._channel is None:
            return render_metrics([self._metrics.snapshot()])
        self.report()
        try:
            text: bytes = await self._ask(MetricsQuestion)
        except TimeoutError:
            return render_metrics([self._metrics.snapshot()])
        return text

    async def node_status(self) -> dict[str, Any]:
        """What `ibexctl status` shows, as a dict, and under `recorder` what the recorder says about itself.

        Empty when there is no supervisor or it does not answer.
        """
        if self._channel is None:
            return {}
        try:
            status: dict[str, Any] = await self._ask(StatusQuestion)
        except TimeoutError:
            return {}
        return status

    def ready(self, **facts: Any) -> None:
        """Say that this child serves."""
        self._send(Ready(facts))

    def fail(self, message: str, hint: str | None = None) -> None:
        """Say why this child cannot start."""
        self._send(Failed(message, hint))

    def confess(self, unfinished: Unfinished) -> None:
        """Say what this child is about to cut."""
        self._send(unfinished)

    def report(self) -> None:
        """Send the metrics and facts as they are now."""
        if self._channel is not None:
            facts = self.read_facts()
            if next(self._reports) % REPORTS_PER_TASK_COUNT == 0:
                facts["tasks"] = len(asyncio.all_tasks())
            self._channel.offer(Report(self._metrics.snapshot(), facts))

    async def report_forever(self) -> None:
        """Report once a second, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self.report()

    async def close(self) -> None:
        """Send the last report and close, once it has left or a second has passed."""
        self.report()
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _ask(self, question: type[MetricsQuestion] | type[StatusQuestion]) -> Any:
        number = next(self._numbers)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._send(question(number))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        finally:
            self._questions.pop(number, None)

    def _send(self, message: AnyMessage) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def _receive(self, message: AnyMessage) -> None:
        match message:
            case Share(_, payload):
                self._hear(payload)
            case MetricsAnswer(number, answer) | StatusAnswer(number, answer):
                question = self._questions.get(number)
                if question is not None and not question.done():
                    question.set_result(answer)
            case Adopt(slot):
                self.on_adopt(slot)
            case Release(slot):
                self.on_release(slot)
            case Withdraw():
                self.on_withdraw()
            case Drain(seconds, has_successor):
                self.has_successor = has_successor
                self.on_drain(seconds)
            case _:
                pass

    def _hear(self, payload: bytes) -> None:
        if self._on_share is None:
            self._unheard.append(payload)
        else:
            self._on_share(payload)

    def _lose(self) -> None:
        if self._channel is not None:
            self._channel = None
            self.on_drain(None)
