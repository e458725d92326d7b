"""What `ibexctl config check` tries, and how it judges what it finds; nothing is started or changed."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ibex.config import Settings, unknown_names
from ibex.engines.addresses import embedded_stores, resolve_addresses
from ibex.engines.datadir import DataDirectory
from ibex.engines.embedded import check_installed
from ibex.errors import OperatorError, RequestError, ServerNotRunning, StoreError
from ibex.providers.openai import OpenAI
from ibex.runtime import clickhouse_migrator
from ibex.stores.postgres.schema import check_schema
from ibex.stores.probes import PostgresFacts, probe_clickhouse, probe_postgres, probe_redis
from ibex.telemetry import Metrics

Result = Literal["ok", "warn", "fail"]
OK: Result = "ok"
WARN: Result = "warn"
FAIL: Result = "fail"

CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 60.0
"""Beyond the first, times of turns and of tokens visibly differ; beyond the second, they mislead."""
SMALL_WINDOW = 100
"""Blocks in ClickHouse's deduplication window below which an outage's backlog may come twice."""
_PROVIDER_SECONDS = 10.0

_ROLE_HINT = "Let IBEX_POSTGRES_DSN log in as ibex_app: infra/scripts/postgres_roles.sql makes that role."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    result: Result
    detail: str
    hint: str | None = None

    def as_data(self) -> dict[str, object]:
        """The finding as `--json` shows it."""
        return asdict(self)


async def examine(settings: Settings) -> list[Finding]:
    """Try everything, side by side; the findings in the order in which a person reads them."""
    groups = await asyncio.gather(
        _guard("settings", None, _check_names),
        _guard("data directory", "IBEX_DATA_DIR", lambda: _check_data_directory(settings)),
        _guard("postgres", "IBEX_POSTGRES_DSN", lambda: _check_postgres(settings)),
        _guard("postgres owner", "IBEX_POSTGRES_ADMIN_DSN", lambda: _check_owner(settings)),
        _guard("redis", "IBEX_REDIS_URL", lambda: _check_redis(settings)),
        _guard("clickhouse", "IBEX_CLICKHOUSE_DSN", lambda: _check_clickhouse(settings)),
        _guard("provider", "OPENAI_BASE_URL", lambda: _check_provider(settings)),
    )
    return [finding for group in groups for finding in group]


async def _guard(name: str, setting: str | None, check: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    """Whatever a check raises is its finding."""
    try:
        return await check()
    except ServerNotRunning:
        return [Finding(name, OK, "embedded; runs while `ibexctl serve` does")]
    except OperatorError as error:
        return [Finding(name, FAIL, error.message, error.hint)]
    except (StoreError, RequestError) as error:
        return [Finding(name, FAIL, error.message, f"Check that it runs, and that {setting} is right.")]


async def _check_names() -> list[Finding]:
    unknown = unknown_names()
    if unknown:
        names = ", ".join(unknown)
        return [Finding("settings", WARN, f"mean nothing: {names}", "`.env.example` lists every name.")]
    return [Finding("settings", OK, "every IBEX_ name that is set means something")]


async def _check_data_directory(settings: Settings) -> list[Finding]:
    path = settings.data_dir.expanduser().resolve()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        hint = "Set IBEX_DATA_DIR to a directory of your own."
        return [Finding("data directory", FAIL, f"{place} cannot be written", hint)]
    holder = DataDirectory(path).holder() if place == path else None
    state = f"in use by process {holder.process.pid}" if holder else "not in use" if place == path else "not made yet"
    return [Finding("data directory", OK, f"{path}: {state}"), _judge_disk(place, settings.journal_min_free_bytes)]


def _judge_disk(place: Path, least: int) -> Finding:
    free = shutil.disk_usage(place).free
    detail = f"{free >> 20:,} MiB free; new chats are refused below {least >> 20:,} MiB"
    if free < least:
        return Finding("disk", FAIL, detail, "Free some space, or lower IBEX_JOURNAL_MIN_FREE_BYTES.")
    return Finding("disk", WARN if free < 2 * least else OK, detail)


async def _check_postgres(settings: Settings) -> list[Finding]:
    dsn = _address(settings, "postgres")
    facts = await probe_postgres(dsn)
    findings = [
        Finding("postgres", OK, f"PostgreSQL {facts.version}, database {facts.database}"),
        _judge_role(facts, settings),
        _judge_clock(facts),
    ]
    try:
        await check_schema(dsn)
    except OperatorError as error:
        findings.append(Finding("postgres schema", FAIL, error.message, error.hint))
    else:
        findings.append(Finding("postgres schema", OK, "current"))
    return findings


def _judge_role(facts: PostgresFacts, settings: Settings) -> Finding:
    rights = facts.rights
    if rights.fault is None:
        detail = f"{rights.name}: no superuser, bound by row security, owns nothing"
        return Finding("postgres role", OK, detail)
    detail = f"{rights.name} {rights.fault}: tenants would not be kept apart"
    return Finding("postgres role", WARN if settings.is_development else FAIL, detail, _ROLE_HINT)


def _judge_clock(facts: PostgresFacts) -> Finding:
    certain = abs(facts.clock_skew) - facts.clock_error
    if certain <= CLOCK_WARN_SECONDS:
        return Finding("clock", OK, f"Postgres and this machine agree within {CLOCK_WARN_SECONDS:g} s")
    direction = "ahead of" if facts.clock_skew > 0 else "behind"
    detail = f"Postgres is {abs(facts.clock_skew):,.1f} s {direction} this machine"
    result = FAIL if certain > CLOCK_FAIL_SECONDS else WARN
    return Finding("clock", result, detail, "Let both machines follow a time server.")


async def _check_owner(settings: Settings) -> list[Finding]:
    dsn = _address(settings, "postgres_admin")
    if not dsn:
        detail = "IBEX_POSTGRES_ADMIN_DSN is not set: `migrate` and operator commands need it, `serve` does not"
        return [Finding("postgres owner", WARN, detail)]
    facts = await probe_postgres(dsn)
    if not facts.rights.is_owner and not facts.rights.is_superuser:
        hint = "Let IBEX_POSTGRES_ADMIN_DSN log in as ibex_owner, and run `ibexctl migrate up`."
        return [Finding("postgres owner", FAIL, f"{facts.rights.name} does not own database {facts.database}", hint)]
    return [Finding("postgres owner", OK, f"{facts.rights.name}, database {facts.database}")]


async def _check_redis(settings: Settings) -> list[Finding]:
    facts = await probe_redis(_address(settings, "redis"))
    findings = [Finding("redis", OK, f"version {facts.version}")]
    if facts.eviction_policy == "noeviction":
        return [*findings, Finding("redis eviction", OK, "noeviction")]
    hint = "Set `maxmemory-policy noeviction`."
    if facts.eviction_policy is None:
        detail = "Redis does not let us ask for its policy (INFO)"
        return [*findings, Finding("redis eviction", WARN, detail, hint)]
    detail = f"{facts.eviction_policy}: with its memory full, Redis forgets the rate limits' counts"
    return [*findings, Finding("redis eviction", WARN if settings.is_development else FAIL, detail, hint)]


async def _check_clickhouse(settings: Settings) -> list[Finding]:
    dsn = _address(settings, "clickhouse")
    facts = await probe_clickhouse(dsn)
    findings = [Finding("clickhouse", OK, f"version {facts.version}")]
    async with clickhouse_migrator(dsn) as migrator:
        try:
            await migrator.check()
        except OperatorError as error:
            return [*findings, Finding("clickhouse schema", FAIL, error.message, error.hint)]
    findings.append(Finding("clickhouse schema", OK, "current"))
    window = facts.deduplication_window
    if not window:
        hint = "alter table llm_traces modify setting non_replicated_deduplication_window = 10000"
        detail = "no deduplication window: a batch that is sent again would be stored twice"
        return [*findings, Finding("deduplication", FAIL, detail, hint)]
    detail = f"the last {window:,} batches are stored once however often they are sent"
    return [*findings, Finding("deduplication", OK if window >= SMALL_WINDOW else WARN, detail)]


async def _check_provider(settings: Settings) -> list[Finding]:
    if settings.resolved_llm_mode == "sandbox":
        return [Finding("provider", OK, "the sandbox: a stand-in that `ibexctl serve` runs itself")]
    default_url = Settings.model_fields["openai_base_url"].default
    if settings.openai_api_key is None and settings.openai_base_url == default_url:
        hint = "Set OPENAI_API_KEY, or OPENAI_BASE_URL for an upstream that needs no key."
        return [Finding("provider", WARN, "none is configured: every chat is answered 501", hint)]
    return [await _reach_provider(settings)]


async def _reach_provider(settings: Settings) -> Finding:
    """Ask for the list of models: the way there, TLS and the key are those of every chat."""
    hasty = settings.model_copy(update={"provider_retries": 0, "provider_first_byte_seconds": _PROVIDER_SECONDS})
    url = settings.openai_base_url
    try:
        provider = OpenAI(hasty, Metrics(), base_url=url, api_key=settings.openai_api_key)
    except ValueError as error:
        return Finding("provider", FAIL, str(error), "See OPENAI_BASE_URL and OPENAI_API_KEY in .env.example.")
    try:
        models = await provider.list_models()
    except RequestError as error:
        if provider.is_away:
            hint = "Check OPENAI_BASE_URL, and that this machine may reach it."
            return Finding("provider", FAIL, f"{url}: {error.message}", hint)
        return Finding("provider", WARN, f"{url} was reached: {error.message}", "Check OPENAI_API_KEY.")
    finally:
        await provider.close()
    return Finding("provider", OK, f"{url} serves {len(models):,} models that IBEX_OPENAI_MODELS allows")


def _address(settings: Settings, store: Literal["postgres", "postgres_admin", "redis", "clickhouse"]) -> str:
    """A store's address; empty when none was given. Raises ServerNotRunning when it is embedded and does not run,
    EmbeddedExtraMissing when it never could.
    """
    if store in embedded_stores(settings):
        check_installed({store})
    address: str = getattr(resolve_addresses(settings, {store}), store)
    return address
