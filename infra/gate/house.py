"""A server of the gate's own, `ibexctl serve` with embedded stores in a temporary directory; a stand-in upstream."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ibex.config import Settings, child_environment
from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from ibex.engines.datadir import DataDirectory
from ibex.engines.postgres_home import find_home
from infra.gate.caller import Caller
from infra.gate.programs import IBEXCTL, ROOT, ProgramFailed, ctl

_STOP_SECONDS = 60.0


@dataclass
class House:
    """A running server and its command line."""

    settings: Settings
    environ: dict[str, str]
    process: asyncio.subprocess.Process
    facts: dict[str, Any]
    """What `serve --json` said when it was ready."""

    @property
    def url(self) -> str:
        """Where the proxy listens."""
        return str(self.facts["url"])

    @property
    def developer(self) -> Caller:
        """The development seed's caller."""
        return Caller(self.url, DEV_TOKEN, str(DEV_AGENT_ID))

    async def ctl(self, *words: str) -> Any:
        """What `ibexctl … --json` says of this house. Raises ProgramFailed."""
        return await ctl(*words, environ=self.environ)

    async def find_pid(self, name: str) -> int:
        """The process of this name, as `ibexctl status` tells it."""
        status = await self.ctl("status")
        return next(int(process["pid"]) for process in status["processes"] if process["name"] == name)

    async def stop(self) -> int:
        """SIGTERM, and the exit code; once it has ended, just that."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_STOP_SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def open_house(settings: Settings) -> AsyncIterator[House]:
    """Start a server with these settings, in a data directory of its own; both are gone afterwards."""
    with TemporaryDirectory(prefix="ibex-gate-") as directory:
        settings = settings.model_copy(update={"data_dir": Path(directory)})
        environ = child_environment(settings, with_provider_keys=True)
        log = Path(directory) / "server.log"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *IBEXCTL, "serve", "--json",
                cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        house = House(settings, environ, process, {})
        try:
            house.facts = json.loads(await _first_line(process) or "{}")
            if "url" not in house.facts:
                raise ProgramFailed(f"the house did not start: {_last_words(house.facts, log)}")
            yield house
        finally:
            try:
                await house.stop()
            except TimeoutError:
                process.kill()
                await process.wait()
            find_home(DataDirectory(settings.data_dir)).remove()


@asynccontextmanager
async def open_stand_in(key: str) -> AsyncIterator[str]:
    """The ibex sandbox as a process of its own, which accepts this key alone; its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ibex.sandbox", "--key", key,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        line = await _first_line(process)
        if not line:
            raise ProgramFailed("the sandbox did not start")
        yield line.split()[-1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _first_line(process: asyncio.subprocess.Process) -> str:
    return (await process.stdout.readline()).decode() if process.stdout is not None else ""


def _last_words(facts: dict[str, Any], log: Path) -> str:
    if "error" in facts:
        return str(facts["error"]["message"])
    return " ".join(log.read_text(errors="replace").splitlines()[-3:])
