"""The stores as servers on a network: real engines that listen on TCP, for nodes that run elsewhere.

    python -m tests.network.stores DIRECTORY POSTGRES_HOST REDIS_HOST CLICKHOUSE_HOST

Prints one JSON object with their DSNs when they serve, and stops them when its standard input ends.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

from ibex.config import load_settings
from ibex.engines.datadir import DataDirectory
from ibex.engines.embedded import EmbeddedEngines
from ibex.engines.engine import Child
from tests.valkey import Valkey

POSTGRES_PORT, CLICKHOUSE_PORT, REDIS_PORT = 5432, 8123, 6379
PASSWORD = "of-the-tests"


async def main(directory: Path, postgres_host: str, redis_host: str, clickhouse_host: str) -> None:
    """Start them, say where they are, and wait for the end of the input."""
    access = directory / "pg_hba.conf"
    access.write_text("local all all scram-sha-256\nhost all all all scram-sha-256\n")
    access.chmod(0o644)
    options = {"listen_addresses": postgres_host, "hba_file": str(access), "fsync": "off", "full_page_writes": "off"}
    settings = load_settings({"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": str(directory / "data")})
    engines = EmbeddedEngines(settings, stores={"postgres", "postgres_admin"}, postgres_options=options)
    valkey = Valkey(
        directory, "--bind", redis_host, "--port", str(REDIS_PORT), "--requirepass", PASSWORD,
        "--maxmemory-policy", "noeviction",
    )  # fmt: skip
    with engines.directory.lock():
        clickhouse = start_clickhouse(engines.directory, clickhouse_host)
        try:
            valkey.start()
            async with engines:
                await until_it_listens(clickhouse_host, CLICKHOUSE_PORT)
                postgres = {
                    name: urlsplit(dsn)._replace(query="").geturl().replace("@/", f"@{postgres_host}:{POSTGRES_PORT}/")
                    for name, dsn in (
                        ("IBEX_POSTGRES_DSN", engines.addresses.postgres),
                        ("IBEX_POSTGRES_ADMIN_DSN", engines.addresses.postgres_admin),
                    )
                }
                others = {
                    "IBEX_REDIS_URL": f"redis://:{PASSWORD}@{redis_host}:{REDIS_PORT}/0",
                    "IBEX_CLICKHOUSE_DSN": f"http://ibex:{PASSWORD}@{clickhouse_host}:{CLICKHOUSE_PORT}/ibex",
                }
                sys.stdout.write(json.dumps(postgres | others) + "\n")
                sys.stdout.flush()
                await asyncio.to_thread(sys.stdin.read)
        finally:
            valkey.stop()
            await clickhouse.stop(signal.SIGTERM, seconds=20)


def start_clickhouse(directory: DataDirectory, host: str) -> Child:
    """The engine's own server, told another address than the loopback interface's."""
    place = directory.path / "clickhouse"
    place.mkdir(mode=0o700)
    return Child.spawn(
        [
            *(sys.executable, "-m", "ibex.engines.clickhouse_server", "--directory", str(place)),
            *("--host", host, "--port", str(CLICKHOUSE_PORT), "--user", "ibex"),
        ],
        log=directory.log_dir / "clickhouse.log",
        environ={**os.environ, "TZ": "UTC"},
        death_signal=signal.SIGTERM,
        cwd=Path.cwd(),
        stdin=PASSWORD.encode(),
    )


async def until_it_listens(host: str, port: int) -> None:
    """Return when somebody accepts there."""
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
