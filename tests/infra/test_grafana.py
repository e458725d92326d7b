"""Dashboards: whole, current, and asking for what there is; the tenants' queries run on a real ClickHouse."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ibex.runtime import clickhouse_migrator
from ibex.stores.clickhouse.traces import TraceStore
from tests.conftest import run_clickhouse
from tests.infra.expressions import CATALOGUE, find_faults
from tests.turns import ORG, make_turn

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "infra" / "grafana"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "dashboards").glob("*.json"))}
UNITS = {"s", "ms", "reqps", "ops", "percentunit", "short", "bytes"}


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def every_target() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each query, and what names it."""
    for uid, dashboard in DASHBOARDS.items():
        for panel in panels_of(dashboard):
            for target in panel["targets"]:
                yield f"{uid}: {panel['title']} {target['refId']}", target


QUERIES = [pytest.param(target, id=name) for name, target in every_target()]


def test_the_dashboards_are_what_their_descriptions_say() -> None:
    script = [sys.executable, str(HERE / "write_dashboards.py"), "--check"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr


def test_their_names_stay_what_links_know() -> None:
    assert {uid: dashboard["uid"] for uid, dashboard in DASHBOARDS.items()} == {
        uid: uid for uid in ("ibex-proxy", "ibex-providers", "ibex-tenants", "ibex-stores")
    }


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_every_panel_says_what_it_shows_and_in_what_unit(uid: str) -> None:
    panels = panels_of(DASHBOARDS[uid])

    assert len(panels) >= 9
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panels_stand_side_by_side_and_not_on_each_other(uid: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[uid]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARDS[uid]["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("target", QUERIES)
def test_what_a_panel_asks_for_exists(target: dict[str, Any]) -> None:
    if "expr" in target:
        assert find_faults(target["expr"]) == []
        assert 'instance=~"$instance"' in target["expr"]
    else:
        assert "$__timeFilter(requested_at)" in target["rawSql"]


def test_every_metric_is_on_some_dashboard() -> None:
    asked = " ".join(target.get("expr", "") for _, target in every_target())

    assert [name for name in CATALOGUE if not re.search(rf"\b{name}(_bucket|_count|_sum)?\b", asked)] == []


def test_every_source_a_dashboard_names_is_one_of_its_variables() -> None:
    for dashboard in DASHBOARDS.values():
        named = set(re.findall(r'"uid": "\$\{(\w+)\}"', json.dumps(dashboard)))
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        assert named <= {name for name, variable in variables.items() if variable["type"] == "datasource"}


def test_the_provisioned_sources_are_of_the_kinds_the_dashboards_want() -> None:
    provisioned = yaml.safe_load((HERE / "provisioning" / "datasources" / "ibex.yaml").read_text())["datasources"]
    wanted = {
        variable["query"]
        for dashboard in DASHBOARDS.values()
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "datasource"
    }

    assert wanted <= {source["type"] for source in provisioned}
    assert {source["uid"] for source in provisioned} == {"ibex-prometheus", "ibex-clickhouse", "ibex-jaeger"}


def expand(sql: str, organizations: str) -> str:
    """A query as the ClickHouse data source sends it, its macros and variables replaced."""
    sql = sql.replace("${organization:singlequote}", organizations)
    sql = re.sub(r"\$__conditionalAll\((.*?\)), \$organization\)", r"\1", sql)
    sql = re.sub(r"\$__timeFilter\((\w+)\)", r"\1 >= toDateTime(now() - 3600) AND \1 <= toDateTime(now() + 3600)", sql)
    sql = re.sub(r"\$__timeInterval\((\w+)\)", r"toStartOfInterval(toDateTime(\1), INTERVAL 60 second)", sql)
    return sql.replace("$__interval_s", "60")


async def test_the_queries_of_tenants_answer_on_a_real_clickhouse(clickhouse_dsn: str) -> None:
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    store = await TraceStore.connect(clickhouse_dsn)
    turns = [
        make_turn(directive_version=3, cached_tokens=4),
        make_turn(outcome="provider_error", error_code="PROVIDER_TIMEOUT", status_code=504, input_tokens=None),
    ]
    await store.insert(turns, token="one")
    await store.close()
    (variable,) = (v for v in DASHBOARDS["ibex-tenants"]["templating"]["list"] if v["name"] == "organization")
    assert run_clickhouse(clickhouse_dsn, variable["query"]).split() == [str(ORG)]

    answers = {
        panel["title"]: run_clickhouse(clickhouse_dsn, expand(target["rawSql"], f"'{ORG}'") + " FORMAT JSONEachRow")
        for panel in panels_of(DASHBOARDS["ibex-tenants"])
        for target in panel["targets"]
    }

    rows = {title: [json.loads(line) for line in answer.splitlines()] for title, answer in answers.items()}
    assert all(rows.values()), rows
    assert {row["name"] for row in rows["Errors"]} == {"PROVIDER_TIMEOUT"}
    assert {row["name"] for row in rows["Ends"]} == {"ok", "provider_error"}
    (leader,) = rows["Organizations in order"]
    assert (int(leader["turns"]), leader["failed"]) == (2, 0.5)
    for panel in panels_of(DASHBOARDS["ibex-tenants"]):
        if panel["type"] == "timeseries":
            assert all(set(row) == {"time", "name", "value"} for row in rows[panel["title"]]), panel["title"]
