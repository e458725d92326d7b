"""Alerts and recording rules: what they ask exists, what they say is whole, and each has a runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.expressions import find_faults

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "infra" / "prometheus"
RUNBOOKS = ROOT / "docs" / "runbooks.md"


def read_rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((HERE / "rules" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = read_rules("alerts.yaml")
RECORDS = read_rules("recording.yaml")
BOTH = [*ALERTS, *RECORDS]


def name_of(rule: dict[str, Any]) -> str:
    return str(rule.get("alert") or rule["record"])


@pytest.mark.parametrize("rule", BOTH, ids=name_of)
def test_what_a_rule_asks_for_exists(rule: dict[str, Any]) -> None:
    recorded = set(re.findall(r"\bibex:[\w:]+", rule["expr"]))

    assert recorded <= {record["record"] for record in RECORDS}
    assert find_faults(re.sub(r"\bibex:[\w:]+", "", rule["expr"])) == []


@pytest.mark.parametrize(
    ("expression", "faults"),
    [
        ("rate(ibex_proxy_nothing_total[5m])", ["there is no metric ibex_proxy_nothing_total"]),
        ("ibex_proxy_overhead_seconds", ["there is no metric ibex_proxy_overhead_seconds"]),
        ('ibex_store_away{shop="x"}', ["ibex_store_away has no label shop"]),
        ("sum by (shop) (ibex_store_away)", ["nothing has the label shop"]),
        ("sum by (job, le) (rate(ibex_proxy_overhead_seconds_bucket[5m]))", []),
    ],
)
def test_a_rule_that_asks_for_nothing_is_found(expression: str, faults: list[str]) -> None:
    assert find_faults(expression) == faults


@pytest.mark.parametrize("alert", ALERTS, ids=name_of)
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    notes = alert["annotations"]

    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["summary"]
    assert notes["description"].endswith(".")
    assert notes["runbook_url"] == f"docs/runbooks.md#{alert['alert'].lower()}"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)

    assert sections == [alert["alert"] for alert in ALERTS]


def test_every_alert_is_seen_to_fire_by_a_unit_test() -> None:
    tests = yaml.safe_load((HERE / "tests" / "alerts.yaml").read_text())["tests"]
    seen = {
        label
        for test in tests
        for check in test["promql_expr_test"]
        for sample in check.get("exp_samples", [])
        for label in re.findall(r'alertname="(\w+)"', sample["labels"])
    }

    assert seen == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        (["check", "rules", "rules/alerts.yaml", "rules/recording.yaml"], "."),
        (["check", "config", "--syntax-only", "prometheus.yaml"], "."),
        (["test", "rules", "alerts.yaml"], "tests"),
    ],
    ids=["the rules", "the configuration", "the rules' own tests"],
)
def test_promtool_agrees(arguments: list[str], directory: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian has it in the package prometheus)")

    done = subprocess.run(
        [promtool, *arguments], cwd=HERE / directory, capture_output=True, text=True, timeout=110, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
