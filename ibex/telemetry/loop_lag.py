"""How late an event loop comes to what is due: the time every request of the process may wait for the others."""

import asyncio
from typing import NoReturn

from ibex.telemetry.metrics import Histogram

SAMPLE_SECONDS = 0.1


async def measure_loop_lag(lag: Histogram) -> NoReturn:
    """Observe the lag ten times a second, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + SAMPLE_SECONDS
        await asyncio.sleep(SAMPLE_SECONDS)
        lag.observe(max(0.0, loop.time() - due))
