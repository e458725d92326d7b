"""The lean generator and the canned provider as processes: started, told, listened to, stopped."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from ibex.errors import OperatorError
from ibexctl.bench.load import Load, Message, Tally, Tick, Warm

_decode = msgspec.json.Decoder(Message).decode


class Generator:
    """One generator with its load: first `warm`, then `measure`."""

    def __init__(self, load: Load, on_tick: Callable[[Tick], None]) -> None:
        self._on_tick = on_tick
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ibexctl.bench.generator"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._tell(msgspec.json.encode(load))

    def warm(self) -> Warm:
        """Wait until the warm-up is over."""
        message = self._listen()
        if not isinstance(message, Warm):
            raise TypeError("the generator did not warm up first")
        return message

    def measure(self) -> Tally:
        """Start the measurement and wait for its end."""
        self._tell(b"go")
        message = self._listen()
        if not isinstance(message, Tally):
            raise TypeError("the generator did not measure")
        return message

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _tell(self, line: bytes) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _listen(self) -> Message:
        for line in self._process.stdout or ():
            message: Message = _decode(line)
            if not isinstance(message, Tick):
                return message
            self._on_tick(message)
        raise OperatorError("The load generator stopped.", hint="Its own words are above.")


@contextmanager
def running_generator(load: Load, on_tick: Callable[[Tick], None]) -> Iterator[Generator]:
    """A generator until the block ends."""
    generator = Generator(load, on_tick)
    try:
        yield generator
    finally:
        generator.close()


@contextmanager
def running_provider(*arguments: str) -> Iterator[int]:
    """`python -m …` that prints where it listens as the end of its first line; its port until the block ends."""
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own modules
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise OperatorError("The provider of the benchmark did not start.", hint="Its own words are above.")
        # the responder prints the number alone, the sandbox a sentence that ends with its address
        yield int(line.strip().removesuffix("/v1").rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
