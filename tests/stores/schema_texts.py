"""A schema as text: sorted, readable, and the same exactly when the schema is. Kept in tests/stores/schemas/."""

from pathlib import Path

import asyncpg

from ibex.stores.migrations import Migration, MigrationKind
from tests.conftest import run_clickhouse

SCHEMAS = Path(__file__).with_name("schemas")

_IN_POSTGRES = """
select 'schema ibex_core' as owner, format('grant %s', a) as line
from pg_namespace, unnest(nspacl) as a where nspname = 'ibex_core'
union all
select format('table %s', relname), concat_ws(', ', 'owner ' || relowner::regrole,
    case when relrowsecurity then 'row security' || case when relforcerowsecurity then ', forced' else '' end end,
    array_to_string(reloptions, ', '))
from pg_class where relnamespace = 'ibex_core'::regnamespace and relkind = 'r'
union all
select format('table %s', c.relname), concat_ws(' ', format('column %s %s', attname, format_type(atttypid, atttypmod)),
    case when attnotnull then 'not null' end, 'default ' || pg_get_expr(adbin, adrelid),
    case when attidentity = 'a' then 'generated always as identity' end)
from pg_class as c join pg_attribute as a on a.attrelid = c.oid and attnum > 0 and not attisdropped
left join pg_attrdef as d on d.adrelid = c.oid and d.adnum = attnum
where c.relnamespace = 'ibex_core'::regnamespace and c.relkind = 'r'
union all
select format('table %s', c.relname), format('constraint %s %s', conname, pg_get_constraintdef(k.oid))
from pg_constraint as k join pg_class as c on c.oid = conrelid
where connamespace = 'ibex_core'::regnamespace and contype <> 'n'
union all
select format('table %s', tablename), format('index %s', regexp_replace(indexdef, '^CREATE ', ''))
from pg_indexes where schemaname = 'ibex_core'
union all
select format('table %s', tablename),
    format('policy %s for %s to %s using %s check %s', policyname, cmd, roles, qual, coalesce(with_check, '-'))
from pg_policies where schemaname = 'ibex_core'
union all
select format('table %s', c.relname), format('trigger %s', pg_get_triggerdef(t.oid))
from pg_trigger as t join pg_class as c on c.oid = tgrelid
where not tgisinternal and c.relnamespace = 'ibex_core'::regnamespace
union all
select format('table %s', c.relname), format('grant %s', a) from pg_class as c, unnest(relacl) as a
where relnamespace = 'ibex_core'::regnamespace and relkind = 'r'
union all
select format('table %s', c.relname), format('grant on %s %s', attname, a)
from pg_class as c join pg_attribute as t on t.attrelid = c.oid, unnest(attacl) as a
where relnamespace = 'ibex_core'::regnamespace
union all
select format('function %s', p.oid::regprocedure), line
from pg_proc as p, regexp_split_to_table(rtrim(pg_get_functiondef(p.oid), E'\\n'), E'\\n') as line
where pronamespace = 'ibex_core'::regnamespace
union all
select format('function %s', p.oid::regprocedure), format('grant %s', a) from pg_proc as p, unnest(proacl) as a
where pronamespace = 'ibex_core'::regnamespace
"""

_IN_CLICKHOUSE = """
select concat('table ', name), arrayJoin(splitByString('\\n', formatQuery(replaceAll(create_table_query,
    concat('CREATE TABLE ', database, '.'), 'CREATE TABLE '))))
from system.tables where database = currentDatabase() format TSVRaw
"""


async def describe_postgres(dsn: str) -> str:
    """Tables with columns, constraints, indexes, policies, triggers and grants; functions; the schema's own grants."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("set search_path = ''")
        rows = await connection.fetch(_IN_POSTGRES)
    finally:
        await connection.close()
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row["owner"], []).append(row["line"])
    return _join({owner: found if owner.startswith("function") else sorted(found) for owner, found in lines.items()})


def describe_clickhouse(dsn: str) -> str:
    """Tables as ClickHouse itself would make them again: columns, indexes, engine, order, TTL, settings."""
    lines: dict[str, list[str]] = {}
    for line in run_clickhouse(dsn, _IN_CLICKHOUSE).splitlines():
        owner, text = line.split("\t", 1)
        lines.setdefault(owner, []).append(text)
    return _join(lines)


def path_of(kind: MigrationKind, migration: Migration) -> Path:
    """Where the schema is kept as it is after this migration."""
    return SCHEMAS / kind / f"{migration.label}.txt"


def _join(lines: dict[str, list[str]]) -> str:
    return "\n".join(
        f"{owner}\n" + "".join(f"    {line}\n" if line.strip() else "\n" for line in found)
        for owner, found in sorted(lines.items())
    )
