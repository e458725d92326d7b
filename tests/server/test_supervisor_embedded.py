"""Whole servers on embedded engines, in processes of their own: start, stop, and what a `kill -9` leaves behind."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from ibex.engines.datadir import DataDirectory
from ibex.engines.processes import ProcessIdentity
from ibex.runtime import open_operator
from ibex.server.supervision.status import request_status
from tests.conftest import remove_data_dir, settings_of

RUN_SUPERVISOR = Path(__file__).with_name("run_supervisor.py")
PROCESSES = ["supervisor", "worker 0", "worker 1", "recorder", "sandbox"]
ENGINES = ["engine postgres", "engine valkey", "engine clickhouse"]


@dataclass
class Server:
    """A server that is ready, and what it said then."""

    process: asyncio.subprocess.Process
    facts: dict[str, Any]
    identities: dict[str, ProcessIdentity]

    @property
    def alive(self) -> list[str]:
        """Which of the processes it had when it was ready still run."""
        return [name for name, identity in self.identities.items() if identity.is_alive]

    def kill(self, name: str, number: signal.Signals) -> None:
        os.kill(self.identities[name].pid, number)

    async def all_ended(self) -> None:
        async with asyncio.timeout(40):
            while self.alive:  # noqa: ASYNC110 (other processes' state)
                await asyncio.sleep(0.05)


async def start(data_dir: Path) -> Server:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(RUN_SUPERVISOR), str(data_dir), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    facts = json.loads(line)
    identities = {entry["name"]: ProcessIdentity.of(entry["pid"]) for entry in facts["processes"]}
    assert all(identities.values())
    return Server(process, facts, identities)  # type: ignore[arg-type]


async def chat(url: str) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {DEV_TOKEN}", "X-IBEX-Agent-ID": str(DEV_AGENT_ID)}
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Reply with exactly: hello"}]}
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http,
        http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        return response.status, await response.json()


async def back_again(data_dir: Path, name: str) -> None:
    """Wait until a process has been started again."""
    async with asyncio.timeout(30):
        while True:
            node = await asyncio.to_thread(request_status, settings_of(data_dir))
            if any(entry.name == name and entry.restarts and entry.is_up for entry in node.processes):
                return
            await asyncio.sleep(0.05)


async def organizations_known(data_dir: Path) -> int:
    async with open_operator(settings_of(data_dir)) as operator:
        return len(await operator.all_org_ids())


@pytest.fixture
def data_dirs(data_dir: Path) -> Iterator[tuple[Path, Path]]:
    """Two data directories that do not exist yet."""
    paths = data_dir / "one", data_dir / "other"
    yield paths
    for path in paths:
        remove_data_dir(path)


@pytest.mark.timeout(180)
async def test_an_empty_directory_becomes_a_server_that_survives_its_own_death(data_dirs: tuple[Path, Path]) -> None:
    """One story, because each start costs seconds: first start, an engine's death, kill -9, second start, Ctrl-C."""
    data_dir, _ = data_dirs
    first = await start(data_dir)
    assert first.facts["is_first_start"]
    assert [entry["name"] for entry in first.facts["processes"]] == [*PROCESSES, *ENGINES]
    assert first.facts["llm_mode"] == "sandbox"
    status, reply = await chat(first.facts["url"])
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "hello")
    assert await organizations_known(data_dir) == 1, "the command line finds the running engines"

    for name in ("engine valkey", "sandbox"):
        first.kill(name, signal.SIGKILL)
    await asyncio.gather(back_again(data_dir, "engine valkey"), back_again(data_dir, "sandbox"))
    assert (await chat(first.facts["url"]))[0] == 200, "both are back where workers look for them"

    first.kill("supervisor", signal.SIGKILL)
    second = await start(data_dir)
    assert first.alive == []
    assert not second.facts["is_first_start"]
    assert (await chat(second.facts["url"]))[0] == 200

    second.process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(second.process.wait(), 40) == 0
    assert second.alive == []
    assert DataDirectory(data_dir).read_run_file("children.json") == []
    assert not (data_dir / "run" / "control.sock").exists()
    await first.process.wait()


@pytest.mark.timeout(180)
async def test_two_servers_run_side_by_side_and_one_directory_has_one(data_dirs: tuple[Path, Path]) -> None:
    one, other = await asyncio.gather(*map(start, data_dirs))
    assert one.facts["url"] != other.facts["url"]
    assert [(await chat(server.facts["url"]))[0] for server in (one, other)] == [200, 200]

    third = await asyncio.create_subprocess_exec(
        sys.executable, str(RUN_SUPERVISOR), str(data_dirs[0]), stderr=asyncio.subprocess.PIPE
    )
    _, complaint = await third.communicate()
    assert third.returncode != 0
    assert f"process {one.identities['supervisor'].pid}" in complaint.decode()

    other.process.kill()
    one.process.terminate()
    assert await asyncio.wait_for(one.process.wait(), 40) == 0
    assert one.alive == []
    await other.all_ended()
    await other.process.wait()
