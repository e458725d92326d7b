"""A loop that is held up is late, and that is seen."""

import asyncio
import time

from ibex.telemetry import Metrics, measure_loop_lag


async def test_a_loop_that_is_held_up_is_seen_to_be_late() -> None:
    lag = Metrics().event_loop_lag_seconds
    task = asyncio.get_running_loop().create_task(measure_loop_lag(lag))
    await asyncio.sleep(0)

    time.sleep(0.3)  # noqa: ASYNC251 - it is what is to be seen
    await asyncio.sleep(0.01)

    task.cancel()
    assert lag.labels().total >= 0.19
