"""The load generator: many keep-alive connections in one lean process, quick enough to saturate nginx.

    python -m ibexctl.bench.generator < load.json

It reads a `Load` as the first line of standard input, warms up, says `Warm`, waits for the line `go`, measures, and
says `Tally`; a `Tick` each second between them. Tokens come by standard input, since arguments are for all to read.
"""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from typing import Final, cast

import httptools
import msgspec
import setproctitle
import uvloop

from ibex.server.process import die_with
from ibexctl.bench.latency import Durations
from ibexctl.bench.load import Load, Message, Tally, Tick, Warm

DRAIN_SECONDS: Final = 30.0
"""How long after its end a measurement waits for the answers that are under way."""
_RECONNECT_SECONDS: Final = 0.05
_SLOW_BUFFER_BYTES: Final = 8192
_ADDRESSES: Final = 16
_now = time.perf_counter


class Phase:
    """What is counted between a start and an end."""

    def __init__(self, load: Load, seconds: float) -> None:
        self.load = load
        self.seconds = seconds
        self.ends_at = _now() + seconds
        self.latency = Durations()
        self.first_byte = Durations()
        self.failures: dict[str, int] = {}
        self.in_time = 0
        self.events = 0
        self.busy = 0
        """Users whose answer is not yet in."""
        self.turns: list[str] = []

    def fail(self, reason: str) -> None:
        """Count a request that got no whole answer."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be asked."""
        return _now() >= self.ends_at

    def tally(self, cpu_seconds: float) -> Tally:
        """The counts."""
        return Tally(
            seconds=self.seconds,
            completed=self.latency.count,
            in_time=self.in_time,
            failures=self.failures,
            events=self.events,
            cpu_seconds=cpu_seconds,
            latency=self.latency.buckets(),
            latency_total=self.latency.total,
            latency_largest=self.latency.largest,
            first_byte=self.first_byte.buckets(),
            first_byte_total=self.first_byte.total,
            first_byte_largest=self.first_byte.largest,
            turns=self.turns,
        )


class User(asyncio.Protocol):
    """One user on one connection, which is made again when it is lost."""

    def __init__(self, load: Load, requests: Sequence[bytes], tls: ssl.SSLContext | None, number: int) -> None:
        self._load = load
        self._local_address = choose_local_address(load.host, number)
        self._requests = requests
        self._tls = tls
        self._turn = 0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._phase: Phase | None = None
        self._asked_at = 0.0
        self._body_at = 0.0
        self._body = b""
        self._turn_id = b""
        self._period = 0.0
        self._due = 0.0
        self._reconnecting: asyncio.Task[None] | None = None
        self._reset()

    async def connect(self) -> None:
        """Connect; raises OSError when nobody listens."""
        load = self._load
        await self._loop.create_connection(
            lambda: self, load.host, load.port, ssl=self._tls, local_addr=self._local_address
        )

    def begin(self, phase: Phase, delay: float, period: float) -> None:
        """Ask from now on, until the phase is over; with a period, not sooner than one after the question before."""
        phase.busy += 1
        self._phase = phase
        self._period = period
        self._due = self._loop.time() + delay
        self._loop.call_later(delay, self._ask)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def _ask(self) -> None:
        phase = self._phase
        if phase is None:
            return
        if phase.is_over:
            self._phase = None
            phase.busy -= 1
            return
        if self._transport is None:
            self._reconnect()
            self._loop.call_later(_RECONNECT_SECONDS, self._ask)
            return
        request = self._requests[self._turn]
        self._turn = (self._turn + 1) % len(self._requests)
        self._asked_at = _now()
        self._transport.write(request)

    def _go_on(self) -> None:
        self._asked_at = 0.0
        if self._period:
            self._due = max(self._due + self._period, self._loop.time())
            self._loop.call_at(self._due, self._ask)
        elif self._load.think_seconds:
            self._loop.call_later(self._load.think_seconds, self._ask)
        else:
            self._ask()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._is_stream = False
        self._ends_with_newline = False
        self._tail = b""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._load.read_bytes_per_second:  # else the kernel reads on in the slow reader's place
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER_BYTES)
        self._reset()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
        if self._load.read_bytes_per_second and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_later(len(data) / self._load.read_bytes_per_second, self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._transport = None
        phase = self._phase
        if phase is None:
            return
        if self._asked_at:
            phase.fail("connection lost")
            self._asked_at = 0.0
            self._loop.call_later(_RECONNECT_SECONDS, self._ask)
        self._reconnect()

    def _reconnect(self) -> None:
        if self._reconnecting is None or self._reconnecting.done():
            self._reconnecting = self._loop.create_task(self._connect_again())

    async def _connect_again(self) -> None:
        while self._phase is not None and self._transport is None:
            with contextlib.suppress(OSError):
                await self.connect()
                return
            await asyncio.sleep(_RECONNECT_SECONDS)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if value.startswith(b"text/event-stream") and name.lower() == b"content-type":
            self._is_stream = True
        elif self._load.notes_turns and name.lower() == b"x-ibex-turn-id":
            self._turn_id = value

    def on_body(self, data: bytes) -> None:
        if not self._is_stream:
            self._body = self._body + data if self._body else data
            return
        phase = self._phase
        if phase is None:
            return
        if not self._tail:
            self._body_at = _now()
        # an event's end may be cut in two
        if self._ends_with_newline and data.startswith(b"\n"):
            phase.events += 1
        phase.events += data.count(b"\n\n")
        self._ends_with_newline = data.endswith(b"\n") and not data.endswith(b"\n\n")
        self._tail = data[-24:] if len(data) >= 24 else (self._tail + data)[-24:]

    def on_message_complete(self) -> None:
        phase, now = self._phase, _now()
        body, self._body = self._body, b""
        tail, self._tail = self._tail, b""
        is_stream, self._is_stream = self._is_stream, False
        self._ends_with_newline = False
        if phase is None or not self._asked_at:
            return
        status = self._parser.get_status_code()
        if status != 200:
            phase.fail(f"status {status}")
        elif not (tail.rstrip().endswith(b"[DONE]") if is_stream else b'"choices"' in body):
            phase.fail("no completion")
        else:
            phase.latency.add(now - self._asked_at)
            if self._load.notes_turns:
                phase.turns.append(self._turn_id.decode("ascii"))
            if now < phase.ends_at:
                phase.in_time += 1
            if is_stream:
                phase.first_byte.add(self._body_at - self._asked_at)
        if self._parser.should_keep_alive():
            self._go_on()
        else:
            self._asked_at = 0.0
            self.close()
            self._loop.call_later(_RECONNECT_SECONDS, self._ask)


async def run_phase(load: Load, users: Sequence[User], seconds: float, period: float = 0.0) -> Tally:
    """Have every user ask for so long, once in a period if there is one; a tick each second."""
    phase = Phase(load, seconds)
    cpu = time.process_time()
    for number, user in enumerate(users):
        user.begin(phase, max(load.ramp_seconds, period) * number / len(users), period)
    begun = _now()
    in_time = failed = second = 0
    while not phase.is_over:
        second += 1
        await asyncio.sleep(max(0.0, min(begun + second, phase.ends_at) - _now()) + 0.001)
        failures = sum(phase.failures.values())
        say(Tick(second=second, completed=phase.in_time - in_time, failed=failures - failed))
        in_time, failed = phase.in_time, failures
    give_up = phase.ends_at + DRAIN_SECONDS
    while phase.busy and _now() < give_up:  # noqa: ASYNC110 - no event is set on the hot path for this
        await asyncio.sleep(0.01)
    if phase.busy:
        phase.failures["no answer in time"] = phase.busy
    return phase.tally(time.process_time() - cpu)


def say(message: Message) -> None:
    """Tell the command."""
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def choose_local_address(host: str, number: int) -> tuple[str, int] | None:
    """Where the user with this number calls from, if that can be chosen.

    A thousand callers are not one address: what ibex grants strangers from each would hold up a run with many tokens.
    """
    if host != "127.0.0.1" or sys.platform != "linux":  # elsewhere loopback has one address
        return None
    return f"127.0.0.{1 + number % _ADDRESSES}", 0


def make_context(load: Load) -> ssl.SSLContext | None:
    """What the target's certificate is checked by; None without TLS."""
    if not load.is_tls:
        return None
    context = ssl.create_default_context()
    if load.authority:
        context.load_verify_locations(load.authority)
    return context


async def run(load: Load) -> None:
    """Warm up, wait to be told, measure."""
    tls = make_context(load)
    # a list shorter than the users is gone through again, so that each has something to send
    requests = load.requests * -(-load.users // len(load.requests))
    users = [User(load, requests[number :: load.users], tls, number) for number in range(load.users)]
    for user in users:
        await user.connect()
    warm = await run_phase(load, users, load.warmup_seconds) if load.warmup_seconds else Tally(seconds=0.0)
    gc.collect()
    gc.freeze()
    say(Warm(completed=warm.completed, failed=warm.failed, failures=warm.failures, turns=warm.turns))
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.readline)
    if line.strip() == b"go":
        pace = (load.share or 0.0) * warm.in_time / (warm.seconds or 1.0)
        say(await run_phase(load, users, load.seconds, load.users / pace if pace else 0.0))
    for user in users:
        user.close()


def main() -> int:
    """The process's entry."""
    setproctitle.setproctitle("ibex: bench generator")
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the command's, which ends this process
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)
    gc.set_threshold(50_000, 20, 20)
    try:
        uvloop.run(run(load))
    except OSError as error:
        sys.stderr.write(f"the generator cannot reach {load.host}:{load.port}: {error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
