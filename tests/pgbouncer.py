"""PgBouncer before a test's database, in transaction mode, with fewer server connections than clients."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_CONFIGURATION = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = plain
auth_file = {directory}/users
pool_mode = transaction
default_pool_size = 2
max_client_conn = 200
server_round_robin = 1
"""


@contextmanager
def pooled(*dsns: str) -> Iterator[list[str]]:
    """The same addresses through a PgBouncer that gives each transaction the connection that has rested longest."""
    assert PROGRAM is not None
    directory = Path(tempfile.mkdtemp(prefix="ibex-"))
    port = _free_port()
    places = [urlsplit(dsn) for dsn in dsns]
    where = parse_qs(places[0].query)
    host = where.get("host", [places[0].hostname])[0]
    (directory / "users").write_text("".join(f'"{place.username}" "{place.password}"\n' for place in places))
    text = _CONFIGURATION.format(
        host=host, port=where.get("port", [places[0].port or 5432])[0], listen_port=port, directory=directory
    )
    (directory / "pgbouncer.ini").write_text(text)
    command = [PROGRAM, "-q", str(directory / "pgbouncer.ini")]
    if os.geteuid() == 0:  # it refuses to run as root
        nobody = pwd.getpwnam("nobody")
        for path in (directory, *directory.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        command += ["-u", "nobody"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_it_listens(port, process, directory / "log")
        yield [
            f"postgresql://{place.username}:{place.password}@127.0.0.1:{port}{place.path}?pgbouncer=true"
            for place in places
        ]
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _wait_until_it_listens(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(log.read_text())
