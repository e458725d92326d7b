"""A journal on a disk that is really full: ends are withheld, not promised, and all is well once there is room."""

import asyncio
import logging
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import make_data_dir
from tests.chaos.books import settle
from tests.chaos.houses import in_the_long_version
from tests.chaos.load import End
from tests.chaos.stores import OwnStores
from tests.chaos.test_stops import KINDS, become

log = logging.getLogger("chaos")

DISK_BYTES = 4 << 20


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A data directory whose journal has a file system of its own, of a few MiB."""
    data_dir = make_data_dir()
    journal = data_dir / "journal"
    journal.mkdir(mode=0o700)
    options = f"size={DISK_BYTES},mode=0700"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", journal], capture_output=True, text=True)
    if mounted.returncode != 0:
        journal.rmdir()
        data_dir.rmdir()
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    try:
        yield data_dir
    finally:
        subprocess.run(["umount", "--lazy", journal], check=True)


@in_the_long_version
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.timeout(900)
async def test_a_disk_that_is_full_withholds_ends_and_loses_nothing_that_was_promised(
    own_stores: OwnStores, small_disk: Path
) -> None:
    node = await own_stores.open_node(
        small_disk, IBEX_JOURNAL_MIN_FREE_BYTES="0", IBEX_JOURNAL_SEGMENT_BYTES=str(256 << 10)
    )
    load = node.load(clients=12, kinds=KINDS, pause=0.02)
    filler = small_disk / "journal" / "filler"
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        for name in ("clickhouse", "postgres"):
            await asyncio.sleep(2)
            since = len(load.sights)
            async with own_stores.away(name):
                fill(filler)
                await become(node, 503, "unhealthy")
                await asyncio.sleep(5)
                reasons = load.failures(since)
                log.info("the disk was full, and %s away: %s", name, dict(reasons))
                assert reasons
                assert {reason.partition(": ")[2] for reason in reasons} == {"503 SERVICE_DEGRADED"}
            await asyncio.sleep(2)  # the disk is still full when the store is back
            filler.unlink()
            await become(node, 200, "ok")
            await asyncio.sleep(3)  # each worker looks at the disk for itself
            since = len(load.sights)
            await asyncio.sleep(2)
            assert load.failures(since) == Counter()
            assert load.count(since)[End.WHOLE] > 0
        load.stop()
    await settle(node)


def fill(path: Path) -> None:
    """Write until there is no byte left."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
