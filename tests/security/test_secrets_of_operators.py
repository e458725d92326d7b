"""What `ibexctl` shows, says of mistakes and audits holds no secret, though operators handle all of them."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable

import pytest

from ibexctl import app as ibexctl
from tests.conftest import PostgresDatabase
from tests.security.canaries import (
    DIRECTIVE,
    LOUD,
    PROVIDER_KEY,
    deliver,
    drive,
    make_search,
    postgres_content,
)
from tests.server.conftest import Edge


@pytest.fixture
def ctl(
    edge: Edge,
    postgres_database: PostgresDatabase,
    redis_url: str,
    clickhouse_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Awaitable[int]]:
    """Runs `ibexctl` in this process, as an operator whose environment holds every secret; its exit code."""
    environ = {
        "IBEX_ENV_FILE": os.devnull,
        "IBEX_DATA_DIR": str(edge.worker.settings.data_dir),
        "IBEX_POSTGRES_DSN": postgres_database.dsn,
        "IBEX_POSTGRES_ADMIN_DSN": postgres_database.admin_dsn,
        "IBEX_REDIS_URL": redis_url,
        "IBEX_CLICKHOUSE_DSN": clickhouse_dsn,
        "IBEX_LOG_LEVEL": "debug",
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": edge.sandbox.base_url,
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    async def run_command(*words: object) -> int:
        return await asyncio.to_thread(ibexctl.run, [str(word) for word in words])

    return run_command


def _commands(edge: Edge, trace: str) -> list[tuple[object, ...]]:
    """Every command that shows what is stored or set; a directive's text is shown by two others, on demand."""
    agent = edge.tenant.agent_id
    return [
        ("config", "show"),
        ("config", "show", "--origin"),
        ("config", "check"),
        ("migrate", "status"),
        ("org", "list"),
        ("org", "show", edge.tenant.org_id),
        ("user", "list"),
        ("agent", "list"),
        ("agent", "show", agent),
        ("token", "list"),
        ("token", "list", "--all"),
        ("directive", "history", agent),
        ("session", "list"),
        ("session", "show", "s", "--agent", agent),
        ("trace", "list"),
        ("trace", "show", trace),
        ("trace", "stats", "--by", "model"),
        ("audit", "list"),
        ("journal", "status"),
        ("journal", "dead-letters", "list"),
        ("reconcile", "--settle", "1s"),
    ]


@pytest.mark.parametrize("edge", [LOUD], indirect=True)
async def test_the_command_line_shows_no_secrets(
    edge: Edge,
    postgres_database: PostgresDatabase,
    clickhouse_dsn: str,
    spans: list[bytes],
    log_lines: None,
    ctl: Callable[..., Awaitable[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is minted and set through it is searched for too; so is what it says of a mistake, and what it audits."""
    search = make_search(edge)
    agent, org = edge.tenant.agent_id, edge.tenant.org_id
    assert await ctl("directive", "set", agent, "--text", DIRECTIVE) == 0
    for name, words in (("minted", ("mint", "--org", org)), ("rotated", ("rotate", edge.tenant.token_id))):
        capfd.readouterr()
        assert await ctl("token", *words, "--json") == 0
        search.secrets[name] = json.loads(capfd.readouterr().out)["token"].split("_", 3)[3].encode()
    await drive(edge)
    await edge.http.close()
    await edge.server.close()
    await deliver(edge, postgres_database.dsn, clickhouse_dsn)
    capfd.readouterr()
    assert await ctl("trace", "list", "--json") == 0
    trace = json.loads(capfd.readouterr().out)["traces"][0]["turn_id"]

    found = []
    for_people_and_programs = ((), ("--json",))
    for words in _commands(edge, trace):
        for flags in for_people_and_programs:
            code = await ctl(*words, *flags)
            shown = capfd.readouterr()
            assert (code, bool(shown.out)) == (0, True), (words, shown)
            found += search.find(f"{words} {flags}", (shown.out + shown.err).encode())
    for secret in (edge.tenant.bearer, f"{edge.tenant.bearer}x"):  # where an id belongs
        for words in (("token", "revoke", secret), ("agent", "show", secret), ("org", "show", secret)):
            for flags in for_people_and_programs:
                await ctl(*words, *flags)
                shown = capfd.readouterr()
                assert shown.out or shown.err, words
                found += search.find(f"the mistake {words[:2]} {flags}", (shown.out + shown.err).encode())
    async for table, rows in postgres_content(postgres_database.superuser_dsn):
        if table == "audit_events":
            assert [rows.count(action) for action in (b"mint", b"rotate", b"set")] >= [1, 1, 1]
            found += search.find(table, rows)
    assert found == []
