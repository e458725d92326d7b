"""The security matrix, row by row, through real HTTP, on real stores.

What needs more than one node (1.5 on every node) is in test_nodes.py; test_rows.py knows all rows.
"""

import asyncio
import io
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest

from ibex.config import Secret
from ibex.pipeline import strangers
from tests.conftest import PostgresDatabase
from tests.relays import relayed
from tests.security.conftest import Cast, CuttableDatabase
from tests.server.conftest import Edge
from tests.waiting import eventually

NOWHERE = Secret("redis://127.0.0.1:9/0")
"""Nobody listens there."""

Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what is presented, and what comes of it."""

    number: str
    title: str
    bearer: Callable[[Cast], str | None]
    agent: Callable[[Cast], object]
    status: int
    code: str | None = None
    authorization: str | None = None
    """Instead of a bearer."""
    org: Callable[[Cast], UUID] | None = None
    """The organization in the path."""


@pytest.fixture
async def postgres_database(postgres_database: PostgresDatabase) -> AsyncIterator[CuttableDatabase]:
    """The database of one test, whose worker can be cut off."""
    async with relayed(postgres_database.dsn) as relay:
        yield CuttableDatabase(
            postgres_database.name,
            relay.dsn,
            postgres_database.admin_dsn,
            postgres_database.superuser_dsn,
            relay=relay,
        )


def of_tenant(cast: Cast) -> str:
    return cast.tenant.bearer


def own_agent(cast: Cast) -> UUID:
    return cast.tenant.agent_id


def nothing(_: Cast) -> None:
    return None


ROWS = [
    Row("1.1", "no Authorization", nothing, own_agent, 401, "MISSING_TOKEN"),
    Row("1.2", "empty bearer", nothing, own_agent, 401, "MISSING_TOKEN", authorization="Bearer "),
    Row("1.3", "malformed", lambda _: "ibex_pat_x", own_agent, 401, "INVALID_TOKEN"),
    Row("1.3", "another scheme", nothing, own_agent, 401, "INVALID_TOKEN", authorization="Basic aWJleDppYmV4"),
    Row("1.4", "unknown", lambda cast: cast.unknown, own_agent, 401, "INVALID_TOKEN"),
    Row("1.4", "wrong secret", lambda cast: cast.wrong_secret, own_agent, 401, "INVALID_TOKEN"),
    Row("1.5", "revoked", lambda cast: cast.revoked, own_agent, 401, "INVALID_TOKEN"),
    Row("1.6", "expired", lambda cast: cast.expired, own_agent, 401, "INVALID_TOKEN"),
    Row("1.7", "valid", of_tenant, own_agent, 200),
    Row("2.1", "no agent", of_tenant, nothing, 400, "MISSING_AGENT_ID"),
    Row("2.2", "not a UUID", of_tenant, lambda _: "agent-7", 400, "VALIDATION_ERROR"),
    Row("2.2", "not a canonical UUID", of_tenant, lambda c: own_agent(c).hex, 400, "VALIDATION_ERROR"),
    Row("2.3", "unknown agent", of_tenant, lambda _: uuid4(), 403, "AGENT_NOT_AUTHORIZED"),
    Row("2.4", "other's agent", of_tenant, lambda cast: cast.other.agent_id, 403, "AGENT_NOT_AUTHORIZED"),
    Row("2.5", "paused", of_tenant, lambda cast: cast.paused, 403, "AGENT_SUSPENDED"),
    Row("2.6", "archived", of_tenant, lambda cast: cast.archived, 403, "AGENT_SUSPENDED"),
    Row("2.7", "active", of_tenant, own_agent, 200),
    Row("3.1", "A and A", of_tenant, own_agent, 200),
    Row("3.1", "B and B", lambda cast: cast.other.bearer, lambda cast: cast.other.agent_id, 200),
    Row("3.2", "A and B", of_tenant, lambda cast: cast.other.agent_id, 403, "AGENT_NOT_AUTHORIZED"),
    Row("3.3", "B and A", lambda cast: cast.other.bearer, own_agent, 403, "AGENT_NOT_AUTHORIZED"),
    Row("3.5", "own path", of_tenant, own_agent, 200, org=lambda cast: cast.tenant.org_id),
    Row(
        *("3.5", "other's path", of_tenant, own_agent, 403, "INSUFFICIENT_PERMISSIONS"),
        org=lambda cast: cast.other.org_id,
    ),
    Row("5.1", "no permissions", lambda cast: cast.powerless, own_agent, 403, "INSUFFICIENT_PERMISSIONS"),
    Row("5.2", "read-only", lambda cast: cast.read_only, own_agent, 403, "INSUFFICIENT_PERMISSIONS"),
    Row("5.3", "full", lambda cast: cast.almighty, own_agent, 200),
    Row("7.4", "bound to another", lambda cast: cast.bound, own_agent, 403, "AGENT_NOT_AUTHORIZED"),
    Row("7.4", "bound to it", lambda cast: cast.bound, lambda cast: cast.bound_agent, 200),
    Row(
        *("7.5", "suspended organization", lambda cast: cast.suspended_org.bearer),
        *(lambda cast: cast.suspended_org.agent_id, 403, "ORG_SUSPENDED"),
    ),
    Row(
        *("7.6", "suspended user", lambda cast: cast.suspended_user.bearer),
        *(lambda cast: cast.suspended_user.agent_id, 403, "USER_SUSPENDED"),
    ),
]


async def present(cast: Cast, row: Row) -> Answer:
    """Send one chat as the row says."""
    bearer, agent = row.bearer(cast), row.agent(cast)
    authorization = row.authorization if bearer is None else f"Bearer {bearer}"
    headers = cast.edge.headers(Authorization=authorization, X_IBEX_Agent_ID=None if agent is None else str(agent))
    path = "/v1/chat/completions" if row.org is None else f"/v1/orgs/{row.org(cast)}/chat/completions"
    body = json.dumps(cast.edge.body).encode()
    async with cast.edge.http.post(cast.edge.url + path, data=body, headers=headers) as response:
        names = {name.lower(): value for name, value in response.headers.items()}
        return response.status, names, await response.read()


def check_envelope(answer: Answer, code: str, *secrets: str) -> dict[str, Any]:
    """Rows 6.1–6.5, which hold for every error."""
    _, headers, content = answer
    assert headers["content-type"] == "application/json"
    error: dict[str, Any] = json.loads(content)["error"]
    assert set(error) - {"field_errors", "docs_url"} == {
        "message", "type", "code", "param", "request_id", "timestamp",
    }  # fmt: skip
    assert error["code"] == code
    assert error["message"]
    assert error["type"].endswith("_error")
    assert UUID(headers["x-request-id"]) == UUID(error["request_id"])
    told = content.decode() + json.dumps(headers)
    for secret in (*secrets, "ibex_pat_", "sk-of-the-provider"):
        assert secret not in told
    return error


async def test_every_caller_is_answered_as_the_matrix_says(cast: Cast, subtests: pytest.Subtests) -> None:
    for round_ in ("first", "from memory"):
        for row in ROWS:
            with subtests.test(f"{row.number} {row.title}, {round_}"):
                answer = await present(cast, row)

                assert answer[0] == row.status, answer[2]
                if row.code is not None:
                    error = check_envelope(answer, row.code, row.bearer(cast) or "ibex_pat_")
                    assert str(cast.other.org_id) not in error["message"]
                    assert "x-ratelimit-limit" not in answer[1]
                    assert answer[1]["x-should-retry"] == "false"


async def test_6_1_to_6_5_and_7_1_every_error_wears_the_envelope(edge: Edge, subtests: pytest.Subtests) -> None:
    """For what is not the caller's identity."""

    async def get(path: str, method: str = "GET") -> Answer:
        async with edge.http.request(method, edge.url + path, headers=edge.headers()) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()

    async def post(**changes: Any) -> Answer:
        return await edge.chat(**changes)

    cases: list[tuple[str, int, str, Any]] = [
        ("no such path", 404, "NOT_FOUND", get("/v1/nothing")),
        ("no such method", 405, "METHOD_NOT_ALLOWED", get("/v1/chat/completions", "PUT")),
        ("7.1 oversized", 413, "PAYLOAD_TOO_LARGE", post(data=io.BytesIO(b"x" * ((1 << 20) + 1)))),
        ("media type", 415, "UNSUPPORTED_MEDIA_TYPE", post(headers={"Content_Type": "text/plain"})),
        ("not JSON", 400, "INVALID_JSON", post(data=b'{"model": ')),
        ("not a chat", 400, "VALIDATION_ERROR", post(messages=[])),
        ("session id", 400, "VALIDATION_ERROR", post(headers={"X_IBEX_Session_ID": "no spaces"})),
        ("provider's refusal", 400, "INVALID_REQUEST", post(sandbox={"status": 400})),
        ("provider's key", 503, "PROVIDER_UNAVAILABLE", post(sandbox={"status": 401})),
    ]
    for title, status, code, request in cases:
        with subtests.test(title):
            answer = await request
            assert answer[0] == status
            check_envelope(answer, code, edge.tenant.bearer)


async def test_1_5_and_7_2_a_warm_token_is_refused_once_it_is_revoked(cast: Cast) -> None:
    row = next(row for row in ROWS if row.number == "1.7")
    await present(cast, row)
    _, headers, _ = await present(cast, row)
    assert headers["x-ibex-auth-cached"] == "true"
    await cast.edge.admin.revoke_token(cast.tenant.token_id)
    await cast.publish(("token", cast.tenant.token_id))

    assert await refused_within(cast, row, 5.0) == "INVALID_TOKEN"


@pytest.mark.parametrize(
    ("kind", "of", "code"),
    [
        ("organization", "org_id", "ORG_SUSPENDED"),
        ("user", "user_id", "USER_SUSPENDED"),
        ("agent", "agent_id", "AGENT_SUSPENDED"),
    ],
)
async def test_2_5_and_7_5_and_7_6_a_warm_caller_is_refused_once_suspended_and_served_once_active(
    cast: Cast, kind: Any, of: str, code: str
) -> None:
    row = next(row for row in ROWS if row.number == "1.7")
    await present(cast, row)
    entity_id = getattr(cast.tenant, of)
    await cast.edge.admin.set_status(kind, entity_id, "suspended")
    await cast.publish((kind, entity_id))
    assert await refused_within(cast, row, 5.0) == code

    await cast.edge.admin.set_status(kind, entity_id, "active")
    await cast.publish((kind, entity_id))
    async with asyncio.timeout(5.0):
        while (await present(cast, row))[0] != 200:  # noqa: ASYNC110 - the change comes from outside
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("edge", [{"redis_url": NOWHERE, "rate_limit_rpm": 100_000}], indirect=True)
async def test_7_3_without_redis_a_revocation_still_holds_within_five_seconds(cast: Cast) -> None:
    row = next(row for row in ROWS if row.number == "1.7")
    await present(cast, row)
    await cast.edge.admin.revoke_token(cast.tenant.token_id)

    assert await refused_within(cast, row, 5.0) == "INVALID_TOKEN"


async def refused_within(cast: Cast, row: Row, seconds: float) -> str:
    """The code of the first refusal; fails when there is none in time."""
    async with asyncio.timeout(seconds):
        while True:
            status, _, content = await present(cast, row)
            if status != 200:
                code: str = json.loads(content)["error"]["code"]
                return code
            await asyncio.sleep(0.01)


async def test_2_8_while_the_identity_store_is_away_the_unknown_wait_and_the_known_are_served(cast: Cast) -> None:
    known, unknown = (next(row for row in ROWS if row.number == number) for number in ("1.7", "1.4"))
    await present(cast, known)
    follower = cast.edge.worker.follower
    await eventually(lambda: follower._subscription.last_pong_sent_at)
    await cast.relay.stop()
    await eventually(lambda: follower.postgres_is_away)

    answer = await present(cast, unknown)
    assert answer[0] == 503
    check_envelope(answer, "SERVICE_DEGRADED", cast.unknown)
    assert answer[1]["retry-after"] == "1"
    assert "x-should-retry" not in answer[1]
    assert (await present(cast, known))[0] == 200

    await cast.relay.start()
    await eventually(lambda: not follower.postgres_is_away)
    assert (await present(cast, unknown))[0] == 401


async def test_3_4_time_does_not_tell_whose_agent_it_is(cast: Cast) -> None:
    rows = [row for row in ROWS if row.number in {"3.2", "3.3"}]
    for _ in range(3):
        times = await take_times(cast, rows)
        p95 = [statistics.quantiles(times[row.title], n=20)[-1] for row in rows]
        if abs(p95[0] - p95[1]) < 0.025:
            return
    pytest.fail(f"p95 differs: {p95}")


async def test_1_4_to_1_6_time_does_not_tell_why_a_token_is_not_good(cast: Cast) -> None:
    rows = [row for row in ROWS if row.number in {"1.4", "1.5", "1.6"}]
    for _ in range(3):
        times = await take_times(cast, rows)
        medians = [statistics.median(times[row.title]) for row in rows]
        if max(medians) - min(medians) < 0.005:
            return
    pytest.fail(f"medians differ: {medians}")


async def take_times(cast: Cast, rows: list[Row]) -> dict[str, list[float]]:
    """Seconds of look-ups in Postgres, taken in turn so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {row.title: [] for row in rows}
    for _ in range(25):
        for row in rows:
            cast.edge.worker.authenticator._refusals.forget(None)
            began = time.perf_counter()
            await present(cast, row)
            times[row.title].append(time.perf_counter() - began)
    return times


@pytest.mark.parametrize("edge", [{"rate_limit_rpm": 60}], indirect=True)
async def test_4_1_to_4_5_a_limit_is_counted_told_and_kept_to_its_organization(cast: Cast) -> None:
    row = next(row for row in ROWS if row.number == "1.7")
    answers = [await present(cast, row) for _ in range(61)]

    assert [status for status, _, _ in answers] == [200] * 60 + [429]
    remaining = [int(headers["x-ratelimit-remaining"]) for _, headers, _ in answers]
    assert remaining == [*range(59, -1, -1), 0]
    assert {headers["x-ratelimit-limit"] for _, headers, _ in answers} == {"60"}
    assert all(-1 <= int(headers["x-ratelimit-reset"]) - time.time() <= 61 for _, headers, _ in answers)
    check_envelope(answers[-1], "RATE_LIMITED", cast.tenant.bearer)
    assert 1 <= int(answers[-1][1]["retry-after"]) <= 60
    assert "x-should-retry" not in answers[-1][1]
    other = next(row for row in ROWS if row.title == "B and B")
    assert (await present(cast, other))[0] == 200


@pytest.mark.parametrize("edge", [{"redis_url": NOWHERE, "rate_limit_rpm": 6, "workers": 1}], indirect=True)
async def test_4_6_without_redis_the_limit_holds_in_this_process(cast: Cast) -> None:
    row = next(row for row in ROWS if row.number == "1.7")
    answers = [await present(cast, row) for _ in range(7)]

    assert [status for status, _, _ in answers] == [200] * 6 + [429]
    assert [int(headers["x-ratelimit-remaining"]) for _, headers, _ in answers] == [5, 4, 3, 2, 1, 0, 0]
    assert 1 <= int(answers[-1][1]["retry-after"]) <= 60


HOSTILE = [
    b"' OR 1=1 --",
    b"ibex_pat_00000000-0000-0000-0000-000000000001'; drop table ibex_core.tokens; --",
    b'"; select pg_sleep(9); --',
    b"%27%20OR%201%3D1%00",
    b"ibex_pat_%s_%s",
    b"ibex_pat_\xc3\xa9\xf0\x9f\xa6\x8c",
    b"ibex_pat_\xff\xfe",
    b"ibex_pat_00000000-0000-0000-0000-00000000000\xd9\xa1_" + b"a" * 43,
    b"ibex_pat_" + b"x" * 8192,
    b"ibex_pat_00000000-0000-0000-0000-000000000001_" + b"a" * 44,
    b"ibex_pat_00000000000000000000000000000001_" + b"a" * 43,
    b"Bearer Bearer",
    b"undefined",
    b"$(reboot)`reboot`",
]


@pytest.mark.parametrize("edge", [{"env": "staging"}], indirect=True)
async def test_7_7_hostile_bearers_are_refused_without_a_question_to_postgres(
    edge: Edge, subtests: pytest.Subtests
) -> None:
    questions = edge.metrics.db_query_duration_seconds.labels("find_credential")
    before = list(questions.read())
    for bearer in (*HOSTILE, b"ibex_dev_sk_LOCALDEVELOPMENTONLY"):
        with subtests.test(repr(bearer[:40])):
            head, content = await send_raw(edge, bearer)
            assert head.startswith(b"HTTP/1.1 401 ")
            assert json.loads(content)["error"]["code"] == "INVALID_TOKEN"
            assert bearer not in content
    for bearer in (b"ibex_pat_\x00", b"ibex\npat", b"ibex\rpat"):
        with subtests.test(f"no HTTP at all: {bearer!r}"):
            head, content = await send_raw(edge, bearer)
            assert head.split(b" ")[1] in {b"400", b"401"}
            assert b"pat" not in content
    assert questions.read() == before


async def send_raw(edge: Edge, bearer: bytes) -> tuple[bytes, bytes]:
    """A chat with this bearer as it stands; the reply's head and body."""
    reader, writer = await edge.open_raw()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: ibex\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nX-IBEX-Agent-ID: %s\r\nAuthorization: Bearer %s\r\nContent-Length: 2\r\n\r\n{}"
        % (str(edge.tenant.agent_id).encode(), bearer)
    )
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head, content


async def test_7_8_neither_host_nor_forwarded_headers_change_who_somebody_is(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = {
        "Host": "admin.example",
        "Forwarded": "for=10.0.0.1;host=admin.example;proto=https",
        "X_Forwarded_For": "10.0.0.1",
        "X_Forwarded_Host": str(cast.other.org_id),
        "X_Forwarded_User": str(cast.other.user_id),
        "X_Real_IP": "10.0.0.1",
    }
    status, _, _ = await cast.edge.chat(headers=claims)
    assert status == 200
    turn = cast.edge.last_turn()
    assert (turn.org_id, turn.agent_id) == (cast.tenant.org_id, cast.tenant.agent_id)
    status, _, _ = await cast.edge.chat(headers={**claims, "X_IBEX_Agent_ID": str(cast.other.agent_id)})
    assert status == 403

    monkeypatch.setattr(strangers, "LONGEST_WAIT", -1.0)
    for number in range(3):
        forged = {"Authorization": f"Bearer {cast.unknown}", "X_Forwarded_For": f"10.0.0.{number}"}
        status, headers, content = await cast.edge.chat(headers=forged)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(content)["error"]["code"] == "RATE_LIMITED"
    assert not any("10.0.0." in name for name in cast.edge.worker.authenticator._gate._buckets)
    assert (await cast.edge.chat())[0] == 200
