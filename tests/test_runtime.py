"""The three builders: what each opens, on real stores, on none, and on an empty data directory."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibex.config import Secret, Settings
from ibex.errors import ConfigurationError, ServerNotRunning
from ibex.runtime import clickhouse_migrator, migrate_embedded, open_operator, open_recorder, open_worker
from ibex.telemetry import Metrics
from tests.tenants import Tenant, make_tenant


class Neighbourhood:
    """Workers that hear each other, without a supervisor between them."""

    def __init__(self) -> None:
        self.members: list[Neighbour] = []

    def join(self) -> "Neighbour":
        self.members.append(Neighbour(self))
        return self.members[-1]


class Neighbour:
    """One of them."""

    def __init__(self, all_: Neighbourhood) -> None:
        self._all = all_
        self.on_share: Callable[[bytes], None] | None = None

    def share(self, payload: bytes, *, key: bytes | None = None) -> None:
        for other in self._all.members:
            if other is not self and other.on_share is not None:
                other.on_share(payload)


@pytest.fixture
async def settings(data_dir: Path, postgres_database: Any, redis_url: str, clickhouse_dsn: str) -> Settings:
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    return Settings(
        data_dir=data_dir,
        postgres_dsn=Secret(postgres_database.dsn),
        postgres_admin_dsn=Secret(postgres_database.admin_dsn),
        redis_url=Secret(redis_url),
        clickhouse_dsn=Secret(clickhouse_dsn),
    )


@pytest.fixture
def nowhere(data_dir: Path) -> Settings:
    """Settings whose stores are all away."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return Settings(
        data_dir=data_dir,
        postgres_dsn=Secret(f"postgresql://ibex_app:secret@127.0.0.1:{port}/ibex"),
        redis_url=Secret(f"redis://127.0.0.1:{port}/0"),
        clickhouse_dsn=Secret(f"http://ibex:secret@127.0.0.1:{port}/ibex"),
    )


async def tenant_of(settings: Settings) -> Tenant:
    async with open_operator(settings) as operator:
        return await make_tenant(operator.identity, "acme")


async def test_a_worker_shares_whom_it_has_verified(settings: Settings) -> None:
    tenant = await tenant_of(settings)
    all_ = Neighbourhood()
    async with (
        open_worker(settings, slot=0, metrics=Metrics(), neighbours=all_.join()) as first,
        open_worker(settings, slot=1, metrics=Metrics(), neighbours=all_.join()) as second,
    ):
        await second.follower.ensure_current()
        caller = (f"Bearer {tenant.bearer}", str(tenant.agent_id), "127.0.0.1")
        verified = await first.authenticator.authenticate(*caller)
        known = await second.authenticator.authenticate(*caller)
        admission = await first.rate_limiter.admit(verified)

    assert verified.org_id == known.org_id == tenant.org_id
    assert (verified.was_cached, known.was_cached) == (False, True)
    assert admission.limit == settings.rate_limit_rpm


async def test_what_a_builder_opened_is_closed(settings: Settings) -> None:
    before = asyncio.all_tasks()
    async with open_worker(settings, slot=0, metrics=Metrics(), neighbours=Neighbourhood().join()):
        assert asyncio.all_tasks() > before
    async with open_recorder(settings, metrics=Metrics()):
        pass
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == before


async def test_stores_that_are_away_delay_no_start(nowhere: Settings) -> None:
    async with asyncio.timeout(5):
        async with open_worker(nowhere, slot=0, metrics=Metrics(), neighbours=Neighbourhood().join()) as worker:
            worker.journal.check_room()
        async with open_recorder(nowhere, metrics=Metrics()):
            pass


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["sandbox"]),
        ({"openai_api_key": "sk-1"}, ["openai"]),
        ({"openai_api_key": "sk-1", "llm_mode": "sandbox"}, ["sandbox"]),
        ({"llm_mode": "live"}, []),
        ({"llm_mode": "live", "openai_base_url": "http://127.0.0.1:9/v1"}, ["openai"]),
    ],
)
async def test_the_providers_there_are_follow_from_the_settings(
    nowhere: Settings, given: dict[str, Any], names: list[str]
) -> None:
    settings = Settings.model_validate({**dict(nowhere), **given})

    async with open_worker(settings, slot=0, metrics=Metrics(), neighbours=Neighbourhood().join()) as worker:
        assert [provider.name for provider in worker.providers] == names


async def test_a_wrong_upstream_is_explained(nowhere: Settings) -> None:
    settings = nowhere.model_copy(update={"openai_base_url": "ftp://example.invalid", "llm_mode": "live"})

    with pytest.raises(ConfigurationError):
        async with open_worker(settings, slot=0, metrics=Metrics(), neighbours=Neighbourhood().join()):
            pass


async def test_a_worker_needs_a_running_server_for_embedded_stores(embedded_settings: Settings) -> None:
    with pytest.raises(ServerNotRunning):
        async with open_worker(embedded_settings, slot=0, metrics=Metrics(), neighbours=Neighbourhood().join()):
            pass


async def test_an_operator_works_on_every_store_and_tells_the_workers(settings: Settings) -> None:
    all_ = Neighbourhood()
    async with open_operator(settings, clickhouse=True) as operator:
        tenant = await make_tenant(operator.identity, "acme")
        version = await operator.directives.set(tenant.agent_id, "Be brief.")
        async with open_worker(settings, slot=0, metrics=Metrics(), neighbours=all_.join()) as worker:
            caller = (f"Bearer {tenant.bearer}", str(tenant.agent_id), "127.0.0.1")
            principal = await worker.authenticator.authenticate(*caller)
            directive = await worker.directive_book.in_force(principal)
            was_told = await operator.publish([("agent", tenant.agent_id)])

        assert await operator.all_org_ids() == [tenant.org_id]
        assert await operator.traces.list(org_ids=[tenant.org_id]) == []
    assert version == 1
    assert directive is not None
    assert directive.text == "Be brief."
    assert was_told


async def test_an_operator_needs_the_owners_address(settings: Settings) -> None:
    ownerless = settings.model_copy(update={"postgres_admin_dsn": Settings.model_fields["postgres_admin_dsn"].default})

    with pytest.raises(ConfigurationError, match="IBEX_POSTGRES_ADMIN_DSN is not set"):
        async with open_operator(ownerless):
            pass


async def test_a_command_on_an_empty_data_directory_starts_migrates_and_stops_what_it_needs(
    embedded_settings: Settings,
) -> None:
    async with open_operator(embedded_settings) as operator:
        org = await operator.identity.create_org("acme")
        applied_again = await migrate_embedded(embedded_settings, operator.addresses, clickhouse=False)
        published = await operator.publish([("organization", org["org_id"])])
    async with open_operator(embedded_settings) as operator:
        orgs = await operator.all_org_ids()

    assert orgs == [org["org_id"]]
    assert applied_again == []
    assert not published, "nobody listens"
    assert not (embedded_settings.data_dir / "valkey").exists()
    assert not (embedded_settings.data_dir / "clickhouse").exists()
