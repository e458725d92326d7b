"""Restarts on purpose, under load: nobody is refused, no connection is reset, every stream ends whole."""

import asyncio
import json
import logging
import os
from collections import Counter
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.acceptance.conftest import House
from tests.chaos.books import settle
from tests.chaos.houses import ChaosHouse
from tests.chaos.load import DONE, Kind

log = logging.getLogger("chaos")

RELOADS = int(os.environ.get("CHAOS_RELOADS", "5"))
IS_LONG = RELOADS > 5
STREAMS = 100
WHOLE = {Kind.JSON: 60, Kind.STREAM: 40}


class IdleClient:
    """One connection that is asked something now and then, and is idle in between; it must never be closed."""

    def __init__(self, house: House, pause: float) -> None:
        self._house = house
        self._pause = pause
        self.answers = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until `stop`; raises when the connection fails."""
        address = urlsplit(self._house.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}).encode()
        fields = {**self._house.headers, "Host": address.netloc, "Content-Type": "application/json"}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**fields, "Content-Length": len(body)}.items())
        request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + body
        while not stop.is_set():
            writer.write(request)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            assert b"connection: close" not in answer
            length = next(line for line in answer.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            self.answers += 1
            await asyncio.sleep(self._pause)
        writer.close()
        await writer.wait_closed()


@pytest.mark.timeout(600)
async def test_a_rolling_restart_under_load_fails_nothing(chaos_house: ChaosHouse) -> None:
    house = chaos_house
    busy = house.load(clients=12 if IS_LONG else 4, kinds=WHOLE)
    fresh = house.load(clients=4 if IS_LONG else 2, kinds=WHOLE, is_fresh=True)
    idle = [IdleClient(house, 0.1 + number * 0.05) for number in range(30)]
    stop = asyncio.Event()
    former = set(house.pids("ibex: worker") + house.pids("ibex: recorder"))
    async with asyncio.TaskGroup() as tasks:
        for client in (busy, fresh):
            tasks.create_task(client.run())
        for client in idle:
            tasks.create_task(client.run(stop))
        for _ in range(RELOADS):
            result = await asyncio.to_thread(house.ctl, "reload")
            assert result["replaced"] == ["worker 0", "worker 1", "recorder"]
            log.info("reloaded in %.1f s", result["seconds"])
        await asyncio.sleep(0.5)
        stop.set()
        busy.stop()
        fresh.stop()
    answers = sum(client.answers for client in idle)
    house.unnoted += answers

    log.info("%d requests on busy, %d on fresh, %d on idle connections", len(busy.sights), len(fresh.sights), answers)
    assert busy.failures() + fresh.failures() == Counter()
    assert {*busy.count(), *fresh.count()} == {"whole"}
    assert not former & set(house.pids("ibex: worker") + house.pids("ibex: recorder"))
    await settle(house)


async def stream(http: aiohttp.ClientSession, house: House, began: asyncio.Event, number: int) -> bytes:
    body = {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": f"stream {number}"}],
        "metadata": {"sandbox": json.dumps({"events": 40, "gap_ms": 40})},
        "stream": True,
    }
    received = b""
    async with http.post(f"{house.url}/v1/chat/completions", json=body, headers=house.headers) as response:
        assert response.status == 200
        async for data in response.content.iter_any():
            received += data
            began.set()
    return received


@pytest.mark.timeout(600)
async def test_a_stop_lets_every_open_stream_end_and_breaks_no_request_it_has_taken(chaos_house: ChaosHouse) -> None:
    house = chaos_house
    loads = [house.load(clients=4, kinds=WHOLE, is_fresh=is_fresh) for is_fresh in (True, False)]
    async with asyncio.TaskGroup() as tasks:
        for load in loads:
            tasks.create_task(load.run())
        for _ in range(5 if IS_LONG else 1):
            await stop_under_streams(house)
            await asyncio.to_thread(house.start_again)
        for load in loads:
            load.stop()
    failures = sum((load.failures() for load in loads), Counter[str]())
    log.info("stopped in mid-load: %s", dict(failures))
    assert {failure.split(": ")[1] for failure in failures} == {"ClientConnectorError"}, "nobody listened, and no more"
    await settle(house)


async def stop_under_streams(house: ChaosHouse) -> None:
    """End the server while streams are open; all of them must become whole."""
    started = [asyncio.Event() for _ in range(STREAMS)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(stream(http, house, began, number)) for number, began in enumerate(started)]
        for began in started:
            await began.wait()
        assert await asyncio.to_thread(house.end) == 0
    house.unnoted += STREAMS
    bodies = [task.result() for task in streams]
    assert all(body.endswith(DONE) for body in bodies)
    contents = [[json.loads(event[6:]) for event in body.split(b"\n\n")[:-2]] for body in bodies]
    assert all(sum(1 for chunk in chunks if chunk["choices"][0]["delta"].get("content")) == 40 for chunks in contents)
