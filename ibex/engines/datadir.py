"""The data directory: whose it is, who is using it, which processes were started on it, and its passwords."""

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import secrets
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ibex.engines.processes import ProcessIdentity
from ibex.errors import ConfigurationError, DataDirectoryLocked, EngineFailed

Role = Literal["serve", "command"]

_LONGEST_SOCKET_DIRECTORY = 85
"""A socket's whole path must fit into 103 bytes on the strictest system; names in it have up to 17."""

_LEFTOVER_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that is using a data directory, and as what: a server, or a command that runs engines for itself."""

    process: ProcessIdentity
    role: Role


class DataDirectory:
    """One `IBEX_DATA_DIR`. Only the holder of its lock may start processes on it or write into it."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.run_dir = self.path / "run"
        self.log_dir = self.path / "logs"
        self._lock_path = self.run_dir / "lock"
        self._children_path = self.run_dir / "children.json"
        self._passwords_path = self.path / "passwords.json"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name this directory elsewhere."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]

    def prepare(self) -> None:
        """Make the directory and its parts, all 0700. Raises ConfigurationError when that is impossible or unsafe."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            for part in (self.run_dir, self.log_dir):
                part.mkdir(mode=0o700, exist_ok=True)
            if not os.access(self.run_dir, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise ConfigurationError(
                f"The data directory {self.path} cannot be used: {error.strerror}.",
                hint="Set IBEX_DATA_DIR to a directory of your own.",
            ) from error

    def _check_owner(self) -> None:
        found = self.path.stat()
        if os.geteuid() not in (0, found.st_uid):
            raise ConfigurationError(
                f"The data directory {self.path} belongs to user {_user_name(found.st_uid)}.",
                hint="Run ibex as that user, or set IBEX_DATA_DIR to a directory of your own.",
            )
        if stat.S_IMODE(found.st_mode) & 0o077 == 0:
            return
        # Closing a directory that others use, such as /tmp, would break the machine for them.
        is_ours = self.run_dir.is_dir() or not any(self.path.iterdir())
        if not is_ours or found.st_mode & stat.S_ISVTX:
            raise ConfigurationError(
                f"The data directory {self.path} is open to other users and holds files that are not ibex's.",
                hint="Set IBEX_DATA_DIR to a directory for ibex alone.",
            )
        self.path.chmod(0o700)

    # The lock

    @contextlib.contextmanager
    def lock(self, role: Role = "serve") -> Iterator[None]:
        """Hold the directory. Raises DataDirectoryLocked at once when another process does."""
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._locked() from None
            holder = {"role": role, **ProcessIdentity.own().to_json()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            try:
                yield
            finally:
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def holder(self) -> Holder | None:
        """Who holds the lock now; None when nobody does."""
        match self._read(self._lock_path):
            case {"role": "serve" | "command" as role, **rest}:
                process = ProcessIdentity.from_json(rest)
                if process is not None and process.is_alive:
                    return Holder(process, role)
            case _:
                pass
        return None

    def _locked(self) -> DataDirectoryLocked:
        holder = self.holder()
        if holder is None:
            return DataDirectoryLocked(f"Another process is using {self.path}.")
        who = "an ibex server" if holder.role == "serve" else "an ibexctl command"
        return DataDirectoryLocked(
            f"{self.path} is in use by {who}, process {holder.process.pid}.",
            hint=f"Stop it with `kill {holder.process.pid}`, or set IBEX_DATA_DIR to another directory.",
        )

    # Children

    def record_child(self, name: str, pid: int, *, stop_signal: int = signal.SIGTERM) -> None:
        """Remember a child until `forget_child`, for the next start to stop it if this process cannot."""
        process = ProcessIdentity.of(pid)
        if process is not None:
            entry = {"name": name, "signal": int(stop_signal), "parent": os.getpid(), **process.to_json()}
            self._write(self._children_path, [*self._children(), entry])

    def forget_child(self, pid: int) -> None:
        """The child has ended."""
        self._write(self._children_path, [entry for entry in self._children() if entry.get("pid") != pid])

    def stop_leftovers(self) -> list[str]:
        """Stop what a holder that died without warning left behind; returns the names of what still ran.

        Blocks until all have ended: each is asked first, and killed after 20 s. Nothing is signalled whose start time
        differs from the one that was recorded.
        """
        left = {}
        for entry in self._children():
            process = ProcessIdentity.from_json(entry)
            if process is not None and entry.get("parent") != os.getpid() and process.is_alive:
                left[process] = entry
        for process, entry in left.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, int(entry["signal"]))
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        while any(process.is_alive for process in left):
            if time.monotonic() > deadline:
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        self._write(self._children_path, [entry for entry in self._children() if entry.get("parent") == os.getpid()])
        return [str(entry["name"]) for entry in left.values()]

    def _children(self) -> list[dict[str, Any]]:
        found = self._read(self._children_path)
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    # Files

    @property
    def socket_dir(self) -> Path:
        """Where sockets lie: the run directory, or, when its path is too long for a socket, a private temporary one.

        Raises EngineFailed when no safe place is found.
        """
        if len(os.fsencode(self.run_dir)) <= _LONGEST_SOCKET_DIRECTORY:
            return self.run_dir
        place = Path(tempfile.gettempdir()) / f"ibex-{os.geteuid()}-{self.digest}"
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
        found = place.lstat()
        is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o077 == 0
        if not is_private or len(os.fsencode(place)) > _LONGEST_SOCKET_DIRECTORY:
            raise EngineFailed(
                f"The path of {self.run_dir} is too long for a socket, and {place} cannot be used instead.",
                hint="Set IBEX_DATA_DIR to a shorter path.",
            )
        return place

    def remove_socket_dir(self) -> None:
        """Remove what `socket_dir` made outside the data directory."""
        if self.socket_dir != self.run_dir:
            shutil.rmtree(self.socket_dir, ignore_errors=True)

    def password(self, name: str) -> str:
        """The password of this name, made when it is asked for first and the same ever after."""
        found = self._read(self._passwords_path)
        passwords: dict[str, str] = found if isinstance(found, dict) else {}
        if name not in passwords:
            passwords[name] = secrets.token_hex(24)
            self._write(self._passwords_path, passwords, is_durable=True)
        return passwords[name]

    def write_run_file(self, name: str, content: Any) -> None:
        """Replace `run/<name>` by this JSON in one step, 0600."""
        self._write(self.run_dir / name, content)

    def read_run_file(self, name: str) -> Any:
        """The JSON in `run/<name>`; None when there is none or it is torn."""
        return self._read(self.run_dir / name)

    def remove_run_file(self, name: str) -> None:
        """Remove `run/<name>` if it is there."""
        (self.run_dir / name).unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error

    @staticmethod
    def _write(path: Path, content: Any, *, is_durable: bool = False) -> None:
        temporary = path.with_name(f".{path.name}.new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file)
                file.flush()
                if is_durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}.") from error


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
