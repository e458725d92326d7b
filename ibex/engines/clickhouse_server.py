"""A ClickHouse for development and trials: chDB in this process behind the part of ClickHouse's HTTP interface that its
clients use. Not for production: one process, no users, no replicas, results held in memory, nothing synced to the disk.

    python -m ibex.engines.clickhouse_server --directory D --host H --port P --user U   the password on standard input

Statements come in the URL (`query`) or the body, settings and `param_…` in the URL, insert data in any format behind
the statement, compressed by Content-Encoding or not. Replies are never compressed. There are no sessions.
"""

import argparse
import asyncio
import base64
import binascii
import gzip
import hmac
import json
import logging
import signal
import sys
import uuid
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web
from setproctitle import setproctitle

from ibex.engines.clickhouse_statements import DEFAULT_FORMAT, ChDB, Outcome, Statement, StatementError

log = logging.getLogger("ibex.engines.clickhouse")

_LARGEST_BODY = 256 << 20
_NOT_SETTINGS = frozenset(
    "query query_id database default_format user password session_id session_timeout session_check quota_key role "  # noqa: SIM905 - reads better
    "compress decompress enable_http_compression http_zlib_compression_level buffer_size wait_end_of_query stacktrace "
    "client_protocol_version send_progress_in_http_headers http_headers_progress_interval_ms".split()
)
"""Parameters of ClickHouse's HTTP interface itself; all others but `param_…` are settings of the statement."""

_STATUS_OF_CODE = {
    **dict.fromkeys((26, 27, 33, 36, 38, 41, 43, 44, 52, 53, 62, 72, 117, 130, 131, 386, 456, 457, 636), 400),
    **dict.fromkeys((46, 47, 50, 55, 60, 63, 73, 75, 81, 115), 404),
    48: 501,
    159: 408,
    516: 403,
}


class ClickHouseServer:
    """Answers HTTP requests by statements on chDB.

    Inserts and other statements have threads of their own, so that a read does not wait behind inserts.
    """

    def __init__(self, chdb: ChDB, *, user: str, password: str) -> None:
        self._chdb = chdb
        self._user, self._password = user, password
        self._inserting = ThreadPoolExecutor(2, "insert")
        self._querying = ThreadPoolExecutor(4, "query")

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=_LARGEST_BODY)
        application.router.add_get("/ping", _ping)
        application.router.add_get("/", self._answer)
        application.router.add_post("/", self._answer)
        return application

    async def _answer(self, request: web.Request) -> web.Response:
        query_id = request.query.get("query_id") or str(uuid.uuid4())
        headers = {"X-ClickHouse-Query-Id": query_id, "X-ClickHouse-Timezone": "UTC"}
        try:
            self._check_password(request)
            statement = await _statement(request)
            if not statement.text.strip():
                return web.Response(text="Ok.\n", headers=headers)
            threads = self._inserting if statement.is_insert else self._querying
            outcome = await asyncio.get_running_loop().run_in_executor(threads, self._chdb.run, statement)
        except StatementError as error:
            headers["X-ClickHouse-Exception-Code"] = str(error.code)
            trailer = "" if "(version " in error.message else f" (version {self._chdb.version})"
            status = _STATUS_OF_CODE.get(error.code, 500)
            return web.Response(status=status, text=f"{error.message}{trailer}\n", headers=headers)
        headers["X-ClickHouse-Summary"] = _summary(outcome)
        if outcome.format is not None:
            headers["X-ClickHouse-Format"] = outcome.format
        return web.Response(body=outcome.body, headers=headers, content_type="application/octet-stream")

    def _check_password(self, request: web.Request) -> None:
        given = _credentials(request)
        ours = f"{self._user}:{self._password}".encode()
        if not hmac.compare_digest(given, ours):
            raise StatementError(
                516, "Code: 516. DB::Exception: Authentication failed: password is incorrect, or there is no user with "
                "such name. (AUTHENTICATION_FAILED)"
            )  # fmt: skip


async def _ping(_: web.Request) -> web.Response:
    return web.Response(text="Ok.\n")


def _credentials(request: web.Request) -> bytes:
    """`user:password` as the client gave it in whichever of the three ways."""
    scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error:
            return b""
    if "X-ClickHouse-User" in request.headers:
        return f"{request.headers['X-ClickHouse-User']}:{request.headers.get('X-ClickHouse-Key', '')}".encode()
    return f"{request.query.get('user', '')}:{request.query.get('password', '')}".encode()


async def _statement(request: web.Request) -> Statement:
    values = dict(request.query)
    if request.content_type == "multipart/form-data":
        form = await request.post()
        values |= {name: value for name, value in form.items() if isinstance(value, str)}
        body = b""
    else:
        body = _decompress(await request.read(), request.headers.get("Content-Encoding", ""))
    query = values.get("query", "").encode()
    settings = {
        name: value for name, value in values.items() if name not in _NOT_SETTINGS and not name.startswith("param_")
    }
    if request.method == "GET":
        settings["readonly"] = "2"  # last, as it forbids further changes
    return Statement(
        query + b"\n" + body if query and body else query or body,
        database=request.headers.get("X-ClickHouse-Database") or values.get("database", ""),
        default_format=request.headers.get("X-ClickHouse-Format") or values.get("default_format") or DEFAULT_FORMAT,
        settings=settings,
        parameters={name[6:]: value for name, value in values.items() if name.startswith("param_")},
    )


def _lz4(data: bytes) -> bytes:
    from lz4 import frame  # type: ignore[import-untyped]

    return bytes(frame.decompress(data))


def _zstd(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    return bytes(zstd.decompress(data))


_DECODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
    "lz4": _lz4,
    "zstd": _zstd,
}


def _decompress(data: bytes, coding: str) -> bytes:
    try:
        return _DECODERS[coding.strip().lower()](data)
    except (KeyError, ImportError):
        raise StatementError(
            48, f"Code: 48. DB::Exception: Content-Encoding {coding} is not supported. (NOT_IMPLEMENTED)"
        ) from None
    except (OSError, EOFError, RuntimeError, zlib.error) as error:
        raise StatementError(
            33, f"Code: 33. DB::Exception: The body cannot be decompressed: {error}. (CANNOT_READ_ALL_DATA)"
        ) from error


def _summary(outcome: Outcome) -> str:
    return json.dumps(
        {
            "read_rows": str(outcome.rows_read),
            "written_rows": str(outcome.rows_written),
            "written_bytes": str(outcome.bytes_written),
        }
    )


async def serve(chdb: ChDB, *, host: str, port: int, user: str, password: str) -> None:
    """Serve until SIGTERM or SIGINT; statements that run are finished."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = ClickHouseServer(chdb, user=user, password=password)
    runner = web.AppRunner(server.application(), access_log=None, auto_decompress=False, shutdown_timeout=5)
    await runner.setup()
    try:
        # The port is shared with the engine that started us, which is bound to it without listening.
        await web.TCPSite(runner, host, port, reuse_port=True).start()
        log.info("ClickHouse %s (chDB) for development and trials, on port %d", chdb.version, port)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Open the directory, warm up, serve."""
    arguments = argparse.ArgumentParser(description="A ClickHouse for development and trials")
    for name in ("directory", "host", "port", "user"):
        arguments.add_argument(f"--{name}", required=True)
    chosen = arguments.parse_args()
    setproctitle("ibex: engine clickhouse")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    password = sys.stdin.readline().strip()
    try:
        chdb = ChDB(Path(chosen.directory))
        chdb.warm_up("ibex")
    except StatementError as error:
        sys.exit(error.message)
    asyncio.run(serve(chdb, host=chosen.host, port=int(chosen.port), user=chosen.user, password=password))
    chdb.close()


if __name__ == "__main__":
    main()
