"""One read for all who ask at once."""

import asyncio
import gc
from typing import Any

import pytest

from ibex.pipeline.single_flight import SingleFlight


async def test_all_who_ask_meanwhile_share_one_read_and_who_comes_later_makes_another() -> None:
    flights: SingleFlight[str, int] = SingleFlight("read")
    count = 0

    async def read() -> int:
        nonlocal count
        count += 1
        number = count
        await asyncio.sleep(0.01)
        return number

    assert await asyncio.gather(*(flights.run(key, read) for key in "aab")) == [1, 1, 2]
    assert await flights.run("a", read) == 3
    assert not flights._flights


async def test_a_read_that_is_over_is_shared_no_more_even_before_it_is_taken_away() -> None:
    flights: SingleFlight[str, int] = SingleFlight("read")
    values = iter((1, 2))

    async def read() -> int:
        return next(values)

    async def ask_in_the_tick_it_ends() -> int:
        while not next(iter(flights._flights.values())).done():  # noqa: ASYNC110 - the very tick is what matters
            await asyncio.sleep(0)
        return await flights.run("a", read)

    loop = asyncio.get_running_loop()
    first = loop.create_task(flights.run("a", read))
    await asyncio.sleep(0)
    later = loop.create_task(ask_in_the_tick_it_ends())

    assert (await first, await later) == (1, 2)


async def test_the_read_goes_on_when_all_have_left_and_its_error_is_not_reported_as_lost() -> None:
    flights: SingleFlight[str, int] = SingleFlight("read")
    lost: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: lost.append(context))
    ended = asyncio.Event()

    async def fail() -> int:
        await asyncio.sleep(0.01)
        ended.set()
        raise ValueError("a fault")

    asking = [loop.create_task(flights.run("a", fail)) for _ in range(2)]
    await asyncio.sleep(0)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await ended.wait()
    await asyncio.sleep(0)
    del asking, task  # their tracebacks hold the read
    gc.collect()

    assert lost == []
    with pytest.raises(ValueError, match="a fault"):
        await flights.run("a", fail)


async def test_closing_gives_reads_up() -> None:
    flights: SingleFlight[str, bool] = SingleFlight("read")
    asking = asyncio.get_running_loop().create_task(flights.run("a", asyncio.Event().wait))
    await asyncio.sleep(0)
    await flights.close()

    assert asyncio.all_tasks() <= {asking, asyncio.current_task()}
    await asyncio.gather(asking, return_exceptions=True)
    assert asking.cancelled()
