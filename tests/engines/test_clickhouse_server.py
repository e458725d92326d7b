"""The embedded ClickHouse answers as ClickHouse does, to clickhouse-connect's own client and to plain HTTP."""

import asyncio
import gzip
import urllib.error
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import clickhouse_connect
import pytest
from clickhouse_connect.driver import AsyncClient
from clickhouse_connect.driver.exceptions import DatabaseError

from ibex.engines.clickhouse_statements import Statement
from tests.conftest import run_clickhouse

TABLE = """CREATE TABLE rows (n UInt64, text Nullable(String), at DateTime64(3, 'UTC')) ENGINE = MergeTree
PARTITION BY toYYYYMM(at) ORDER BY n SETTINGS non_replicated_deduplication_window = 100"""


@pytest.fixture
async def client(clickhouse_dsn: str) -> AsyncIterator[AsyncClient]:
    client = await clickhouse_connect.get_async_client(dsn=clickhouse_dsn)
    await client.command(TABLE)
    yield client
    await client.close()


async def insert(client: AsyncClient, rows: list[list[object]], token: str) -> int:
    summary = await client.insert(
        "rows", rows, column_names=["n", "text", "at"], settings={"insert_deduplication_token": token}
    )
    return int(summary.written_rows)


async def count(client: AsyncClient) -> object:
    return await client.command("SELECT count() FROM rows")


async def test_a_batch_sent_twice_is_there_once(client: AsyncClient) -> None:
    rows: list[list[object]] = [[n, f"text {n}", 1_790_000_000 + n * 86_400] for n in range(100)]  # over four months
    assert await insert(client, rows, "batch 1") == 100
    await insert(client, rows, "batch 1")
    assert await count(client) == 100
    await insert(client, rows, "batch 2")
    assert await count(client) == 200


@pytest.mark.parametrize("compression", ["lz4", "zstd", "gzip", False])
async def test_values_come_back_as_they_went_in(clickhouse_dsn: str, compression: str | bool) -> None:
    client = await clickhouse_connect.get_async_client(dsn=clickhouse_dsn, compress=compression)
    await client.command(TABLE)
    rows: list[list[object]] = [[10, "\n\n", 0], [2**64 - 1, None, 0], [0, "a\x00b'\\ü\t", 0]]
    await insert(client, rows, "1")
    found = (await client.query("SELECT n, text FROM rows ORDER BY n")).result_rows
    assert found == [(0, "a\x00b'\\ü\t"), (10, "\n\n"), (2**64 - 1, None)]
    await client.close()


async def test_parameters_are_values_and_never_sql(client: AsyncClient) -> None:
    hostile = "x' OR 1=1 --\\\t\n{y:String}"
    await insert(client, [[1, hostile, 0], [2, "other", 0]], "1")
    query = "SELECT n FROM rows WHERE text = {text:String} AND n IN {ns:Array(UInt64)}"
    found = await client.query(query, parameters={"text": hostile, "ns": [1, 2]})
    assert found.result_rows == [(1,)]


async def test_a_result_without_rows_has_none(client: AsyncClient) -> None:
    assert (await client.query("SELECT n FROM rows")).result_rows == []
    assert (await client.query("SELECT n, text FROM rows LIMIT 0")).column_names == ("n", "text")
    assert await client.command("SELECT text FROM rows") == ""


async def test_settings_hold_for_their_statement_alone(client: AsyncClient) -> None:
    with pytest.raises(DatabaseError, match="TOO_MANY_ROWS"):
        await client.query("SELECT * FROM numbers(10)", settings={"max_rows_to_read": 5})
    assert len((await client.query("SELECT * FROM numbers(10)")).result_rows) == 10


@pytest.mark.parametrize(
    ("statement", "status", "code"),
    [
        ("SELECT * FROM missing", 404, 60),
        ("SELECT missing", 404, 47),
        ("SELEC 1", 400, 62),
        ("INSERT INTO rows (n) FORMAT CSV\nnot a number\n", 400, 117),
        ("INSERT INTO missing (n) FORMAT Native\n", 404, 60),
    ],
)
async def test_an_error_has_clickhouses_code_and_text(
    client: AsyncClient, clickhouse_dsn: str, statement: str, status: int, code: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        await asyncio.to_thread(run_clickhouse, clickhouse_dsn, statement)
    with caught.value as answer:
        assert (answer.code, answer.headers["X-ClickHouse-Exception-Code"]) == (status, str(code))
        text = answer.read().decode()
    assert text.startswith(f"Code: {code}. DB::Exception: ")
    assert "(version 26." in text


async def test_nobody_gets_in_without_the_password(clickhouse_dsn: str) -> None:
    where = urlsplit(clickhouse_dsn)
    base = f"http://{where.hostname}:{where.port}/"
    async with aiohttp.ClientSession() as session:
        assert (await session.get(f"{base}ping")).status == 200
        for login in (None, ("ibex", "wrong"), ("default", "")):
            headers = {"Authorization": aiohttp.encode_basic_auth(*login)} if login else {}
            answer = await session.get(base, params={"query": "SELECT 1"}, headers=headers)
            assert (answer.status, answer.headers["X-ClickHouse-Exception-Code"]) == (403, "516")
        headers = {"X-ClickHouse-User": "ibex", "X-ClickHouse-Key": where.password or ""}
        answer = await session.get(base, params={"query": "SELECT 1", "query_id": "mine"}, headers=headers)
        assert (await answer.text(), answer.headers["X-ClickHouse-Query-Id"]) == ("1\n", "mine")


async def test_a_statement_comes_in_the_url_or_the_body_or_both(client: AsyncClient, clickhouse_dsn: str) -> None:
    where = urlsplit(clickhouse_dsn)
    url, database = f"http://{where.hostname}:{where.port}/", {"database": where.path[1:]}
    login = {"Authorization": aiohttp.encode_basic_auth(where.username or "", where.password or "")}
    async with aiohttp.ClientSession(headers=login) as session:

        async def ask(params: dict[str, str], data: bytes | None = None, **headers: str) -> str:
            async with session.post(url, params={**database, **params}, data=data, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.text()

        csv = gzip.compress(b"1,one,2026-01-01 00:00:00\n2,two,2026-02-01 00:00:00\n")
        await ask({"query": "INSERT INTO rows FORMAT CSV"}, csv, **{"Content-Encoding": "gzip"})
        await ask({"query": "INSERT INTO rows VALUES"}, b"(3, 'three FORMAT Native', 0)")
        await ask({}, b"INSERT INTO rows SELECT 4, 'four', 0")
        assert await ask({"default_format": "CSV"}, b"SELECT n, text FROM rows ORDER BY n LIMIT 1") == '1,"one"\n'
        assert await ask({"query": "SELECT count()"}, b"FROM rows") == "4\n"
        async with session.get(url, params={**database, "query": "TRUNCATE TABLE rows"}) as answer:
            assert "READONLY" in await answer.text()
    assert await count(client) == 4


async def test_a_read_does_not_wait_behind_inserts(client: AsyncClient) -> None:
    rows: list[list[object]] = [[n, "text", 0] for n in range(1000)]
    done = []

    async def write(number: int) -> None:
        for batch in range(5):
            await insert(client, rows, f"{number} {batch}")
        done.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(8):
            tasks.create_task(write(number))
        reads = 0
        while len(done) < 8:
            await count(client)
            reads += 1
    assert reads > 5
    assert await count(client) == 40_000


@pytest.mark.parametrize(
    ("text", "is_insert"),
    [
        (b"INSERT INTO t FORMAT Native\n\x00", True),
        (b"  insert into `a.b`.`t` (`n`, `m`) format Native\n", True),
        (b"INSERT INTO t (n) SETTINGS async_insert=0 FORMAT CSV\n1", True),
        (b"INSERT INTO t VALUES (' FORMAT CSV')", False),
        (b"INSERT INTO t SELECT 1 FORMAT CSV", False),
        (b"SELECT 1 FORMAT CSV", False),
    ],
)
def test_an_insert_with_data_is_told_from_other_statements(text: bytes, is_insert: bool) -> None:
    assert Statement(text).is_insert is is_insert
