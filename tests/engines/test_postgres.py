"""The embedded PostgreSQL: who gets in, as what, and what it says when its data does not fit."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator

import asyncpg
import pytest

from ibex.config import Settings
from ibex.engines import postgres_home
from ibex.engines.embedded import EmbeddedEngines
from ibex.engines.postgres_home import PostgresHome
from ibex.errors import EngineFailed
from tests.conftest import PostgresDatabase, new_data_dir, quick_engines, run_apart, settings_of


def as_root_only() -> pytest.MarkDecorator:
    return pytest.mark.skipif(os.geteuid() != 0, reason="as root PostgreSQL lives outside the data directory")


@pytest.fixture
def engines(embedded_settings: Settings) -> EmbeddedEngines:
    return quick_engines(embedded_settings, {"postgres"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedEngines]:
    """A cluster that has been made and is not running; its lock is held."""
    with new_data_dir() as data_dir:
        engines = quick_engines(settings_of(data_dir), {"postgres"})
        with engines.directory.lock():
            run_apart(engines.start())
            run_apart(engines.stop())
            yield engines


def home_of(engines: EmbeddedEngines) -> PostgresHome:
    assert engines.postgres is not None
    return engines.postgres.home


async def test_there_is_no_way_in_but_the_private_socket(running_engines_session: EmbeddedEngines) -> None:
    postgres = running_engines_session.postgres
    assert postgres is not None
    assert postgres.home.sockets.stat().st_mode & 0o077 == 0
    connection = await asyncpg.connect(postgres.dsn_of("postgres", "postgres"))
    settings = await connection.fetchrow(
        "SELECT current_setting('listen_addresses'), current_setting('unix_socket_directories')"
    )
    assert settings is not None
    assert tuple(settings) == ("", str(postgres.home.sockets))
    rules = await connection.fetch("SELECT type, auth_method FROM pg_hba_file_rules")
    assert [tuple(rule) for rule in rules] == [("local", "scram-sha-256")]
    await connection.close()


async def test_a_wrong_password_is_refused(postgres_database: PostgresDatabase) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres_database.dsn, password="wrong")


async def test_the_two_roles_have_no_more_rights_than_they_need(postgres_database: PostgresDatabase) -> None:
    connection = await asyncpg.connect(postgres_database.dsn)
    rows = await connection.fetch(
        "SELECT rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication AS is_mighty FROM pg_roles "
        "WHERE rolname IN ('ibex_owner', 'ibex_app')"
    )
    assert [row["is_mighty"] for row in rows] == [False, False]
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("CREATE TABLE mine (n int)")
    await connection.close()


async def test_data_of_another_version_is_named(cluster: EmbeddedEngines) -> None:
    version = home_of(cluster).data / "PG_VERSION"
    version.write_text("17\n")
    try:
        with pytest.raises(EngineFailed, match=r"is of PostgreSQL 17, and the embedded one is 18"):
            await cluster.start()
    finally:
        version.write_text("18\n")


async def test_a_failure_is_told_in_its_own_words(cluster: EmbeddedEngines) -> None:
    control = home_of(cluster).data / "global" / "pg_control"
    control.rename(control.with_suffix(".away"))
    try:
        with pytest.raises(EngineFailed, match=r"PostgreSQL did not start: .*pg_control") as caught:
            await cluster.start()
        assert str(cluster.engines[0].log) in str(caught.value.hint)
    finally:
        control.with_suffix(".away").rename(control)


@pytest.mark.parametrize("is_zombie", [False, True])
async def test_a_pid_file_naming_another_process_does_not_keep_it_down(
    cluster: EmbeddedEngines, is_zombie: bool
) -> None:
    home = home_of(cluster)
    async with cluster:
        content = (home.data / "postmaster.pid").read_text().splitlines()
    left = home.data / "postmaster.pid"
    with subprocess.Popen(["true"]) as zombie:  # noqa: ASYNC220 - until it is waited for, which is at the block's end
        pid = zombie.pid if is_zombie else os.getpid()
        left.write_text("\n".join([str(pid), *content[1:]]) + "\n")
        home.own(left)
        async with cluster:
            assert cluster.engines[0].pid is not None


async def test_a_crash_while_the_cluster_is_made_leaves_nothing_half_done(engines: EmbeddedEngines) -> None:
    half = home_of(engines).root / "initdb-crashed"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    with engines.directory.lock():
        async with engines:
            assert not half.exists()


@as_root_only()
async def test_as_root_it_lives_outside_as_nobody(cluster: EmbeddedEngines) -> None:
    home = home_of(cluster)
    async with cluster:
        assert os.stat(f"/proc/{cluster.engines[0].pid}").st_uid == pwd.getpwnam("nobody").pw_uid  # noqa: PTH116
    assert home.root.parent == postgres_home.ROOT_PLACE
    assert (cluster.directory.path / "postgres-home").read_text().strip() == str(home.root)
    assert (home.root.owner(), home.programs.owner(), home.data.owner()) == ("root", "root", "nobody")
    assert home.data.stat().st_mode & 0o077 == 0


@as_root_only()
async def test_root_needs_nothing_prepared_and_no_open_umask(
    engines: EmbeddedEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_data_dir() as place:
        place.chmod(0o755)
        monkeypatch.setattr(postgres_home, "ROOT_PLACE", place / "ibex")
        umask = os.umask(0o077)
        try:
            with engines.directory.lock():
                async with engines:
                    assert home_of(engines).programs.is_relative_to(place)
        finally:
            os.umask(umask)


@as_root_only()
def test_data_that_is_gone_is_not_made_anew(engines: EmbeddedEngines) -> None:
    shutil.rmtree(home_of(engines).root)
    with pytest.raises(EngineFailed, match="is gone") as caught:
        postgres_home.find_home(engines.directory)
    assert "Restore it, or remove" in str(caught.value.hint)


@as_root_only()
def test_what_an_earlier_data_directory_left_is_set_aside(engines: EmbeddedEngines) -> None:
    root = home_of(engines).root
    (root / "old").touch()
    (engines.directory.path / "postgres-home").unlink()
    assert not (postgres_home.find_home(engines.directory).root / "old").exists()
    (aside,) = root.parent.glob(f"{root.name}.orphan-*")
    assert (aside / "old").exists()
    shutil.rmtree(aside)


@as_root_only()
def test_data_of_an_ordinary_user_is_not_touched_by_root(embedded_settings: Settings) -> None:
    (embedded_settings.data_dir / "postgres").mkdir()
    engines = EmbeddedEngines(embedded_settings, stores={"postgres"})
    assert engines.postgres is not None
    with pytest.raises(EngineFailed, match="was made by user"):
        postgres_home.find_home(engines.directory)
