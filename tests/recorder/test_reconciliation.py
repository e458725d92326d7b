"""What is deleted for its age is no difference between the stores."""

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from ibex.domain.identity import OrgId
from ibex.recorder.reconciliation import kept_part, reconcile
from ibex.recorder.survey import survey_journal
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from ibex.stores.tallies import Period
from tests.recorder.conftest import House
from tests.turns import ORG, make_turn


@pytest.mark.parametrize(
    ("asked", "retention", "kept"),
    [(1, 0, 1), (365, 0, 90), (365, 30, 30), (29, 30, 29), (365, 200, 90), (20, 30, 20)],
)
def test_no_period_reaches_back_to_what_a_store_has_deleted(asked: int, retention: int, kept: int) -> None:
    now = datetime.now(UTC)
    period = kept_part(Period(now - timedelta(days=asked), now), timedelta(days=retention))
    assert period.until == now
    back = now - period.since
    assert timedelta(days=kept) - timedelta(hours=3) < back <= timedelta(days=kept)


def test_a_period_of_which_nothing_is_kept_is_empty() -> None:
    long_ago = datetime.now(UTC) - timedelta(days=100)
    period = kept_part(Period(long_ago - timedelta(days=1), long_ago), timedelta())
    assert period == Period(long_ago, long_ago)


async def test_checkpoints_past_their_retention_are_not_missed(house: House) -> None:
    age = timedelta(days=31)
    then = int((datetime.now(UTC) - age).timestamp() * 1e6)
    old = [make_turn(requested_at=then, started_at=then, completed_at=then) for _ in range(5)]
    await house.write([*old, make_turn()])
    await house.deliver()
    owner = await asyncpg.connect(house.postgres.admin_dsn)
    await owner.execute("update ibex_core.checkpoints set recorded_at = completed_at")
    await owner.close()
    pool, traces = await Postgres.connect(house.postgres.admin_dsn, name="operator"), TraceStore(house.clickhouse_dsn)
    sessions, retention = SessionStore(pool), timedelta(days=30)
    now = datetime.now(UTC) + timedelta(seconds=1)
    whole = Period(now - timedelta(days=60), now)

    async def count_differences(period: Period) -> tuple[int, int]:
        survey = survey_journal(house.settings)
        found = await reconcile(survey, sessions, traces, [OrgId(ORG)], period)
        return found.traces, len(found.differences)

    assert await count_differences(whole) == (6, 0)
    await sessions.expire(retention)
    assert await count_differences(whole) == (6, 5)
    assert await count_differences(kept_part(whole, retention)) == (1, 0)
    await traces.close()
    await pool.close()
