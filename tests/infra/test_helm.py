"""The chart: what it renders is accepted by Kubernetes' own schemas, and agrees with what ibex does."""

import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

import ibex
from tests.infra.places import BESIDES, INFRA, strangers

CHART = INFRA / "helm" / "ibex"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
KUBERNETES = ["1.27", "1.31", "1.34"]
SETS = ["", "everything", "bare"]
"""The defaults, and the files in `ci/`."""


def helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run helm on the chart."""
    if shutil.which("helm") is None:
        pytest.skip("helm is not installed (go install helm.sh/helm/v3/cmd/helm@latest)")
    return subprocess.run(["helm", *arguments, "--kube-version", "1.31.0"], capture_output=True, text=True)


def values_of(name: str) -> list[str]:
    return ["--values", str(CHART / "ci" / f"{name}.yaml")] if name else []


@cache
def render(values: str) -> list[dict[str, Any]]:
    """Every manifest, with these values."""
    done = helm("template", "ibex", str(CHART), "--namespace", "llm", *values_of(values))
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def find(values: str, kind: str, name: str = "") -> dict[str, Any]:
    """The one manifest of a kind whose name ends so."""
    (found,) = [it for it in render(values) if it["kind"] == kind and it["metadata"]["name"].endswith(name)]
    return found


def pods(values: str) -> dict[str, dict[str, Any]]:
    """The spec of every pod there may be, by the kind that makes it."""
    kinds = {"StatefulSet", "Job", "Pod"}
    return {it["kind"]: it["spec"].get("template", it)["spec"] for it in render(values) if it["kind"] in kinds}


# What needs no helm


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["appVersion"] == chart["version"] == ibex.__version__


def test_every_name_is_a_setting() -> None:
    for path in (path for path in CHART.rglob("*") if path.suffix in {".yaml", ".tpl", ".txt", ".md"}):
        assert strangers(path.read_text()) == set(), path.name


def test_the_schema_knows_every_value_and_no_other() -> None:
    def compare(values: dict[str, Any], schema: dict[str, Any], place: str) -> None:
        known = schema["properties"]
        assert set(values) == set(known) - {"global"}, place
        for name, value in values.items():
            within = known[name]
            if "$ref" in within:
                within = SCHEMA["definitions"][within["$ref"].rpartition("/")[2]]
            if isinstance(value, dict) and "properties" in within and name != "resources":
                compare(value, within, f"{place}.{name}")

    compare(VALUES, SCHEMA, "values")


def test_the_grace_period_leaves_time_for_what_a_stop_takes_besides() -> None:
    (seconds,) = re.findall(r"add .*shutdown.timeoutSeconds\) (\d+)", (CHART / "templates/_helpers.tpl").read_text())

    assert int(seconds) >= BESIDES


def test_the_rules_are_those_of_prometheus() -> None:
    assert (CHART / "rules").resolve() == INFRA / "prometheus" / "rules"


# What helm says


@pytest.mark.parametrize("values", SETS)
def test_helm_finds_nothing_to_complain_of(values: str) -> None:
    done = helm("lint", "--strict", str(CHART), *values_of(values))

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "replicas=-1", "image.tag=latest", "nonsense=1", "environment=development", "config.IBEX_WORKERS=3",
        "config.IBEX_POSTGRES_DSN=postgresql://u:p@h/d", "persistence.accessModes={ReadWriteMany}",
    ],
)  # fmt: skip
def test_values_that_cannot_be_meant_are_refused(value: str) -> None:
    assert "schema" in helm("template", str(CHART), "--set", value).stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", SETS)
def test_kubernetes_accepts_every_manifest(values: str, version: str) -> None:
    manifests = [it for it in render(values) if "monitoring.coreos.com" not in it["apiVersion"]]
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed (108 MB of schemas: pip install kubernetes-validate)")
    from kubernetes_validate import validate

    for manifest in manifests:
        validate(manifest, version, strict=True)


# What it renders


@pytest.mark.parametrize("values", SETS)
def test_a_pod_has_longer_to_end_than_ibex_takes(values: str) -> None:
    pod = pods(values)["StatefulSet"]
    (container,) = pod["containers"]
    settings = {entry["name"]: entry.get("value") for entry in container["env"]}
    seconds = [settings["IBEX_SHUTDOWN_DELAY"], settings["IBEX_SHUTDOWN_TIMEOUT"]]
    seconds.append(container["lifecycle"]["preStop"]["exec"]["command"][1])

    assert pod["terminationGracePeriodSeconds"] >= sum(map(float, seconds)) + BESIDES


@pytest.mark.parametrize("values", SETS)
def test_every_pod_is_restricted_and_has_no_token(values: str) -> None:
    for kind, pod in pods(values).items():
        assert pod["automountServiceAccountToken"] is False, kind
        assert pod["securityContext"]["runAsNonRoot"] is True, kind
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, kind
        for container in pod["containers"]:
            assert container["securityContext"] == VALUES["securityContext"], kind
            assert container["resources"]["limits"]["memory"], kind


def test_no_node_sees_the_owners_address_and_no_secret_is_an_environment_variable() -> None:
    node, migrations = pods("")["StatefulSet"], pods("")["Job"]

    assert "admin" not in json.dumps(node).lower()
    assert "postgres-admin-dsn" in json.dumps(migrations)
    assert "secretKeyRef" not in json.dumps([node, migrations])


def test_every_file_that_ibex_is_told_of_is_mounted() -> None:
    for pod in (pods("everything")["StatefulSet"], pods("everything")["Job"]):
        sources = next(volume["projected"]["sources"] for volume in pod["volumes"] if volume["name"] == "secrets")
        files = {item["path"] for source in sources for item in source["secret"]["items"]}
        told = {entry["value"] for entry in pod["containers"][0]["env"] if entry["name"].endswith("_FILE")}
        assert told == {f"/run/secrets/ibex/{name}" for name in files}


def test_a_claim_outlives_its_pod_and_is_where_the_image_writes() -> None:
    nodes = find("", "StatefulSet")["spec"]
    image = (INFRA / "docker" / "Dockerfile").read_text()
    mounted = {
        mount["name"]: mount["mountPath"] for mount in nodes["template"]["spec"]["containers"][0]["volumeMounts"]
    }

    assert nodes["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert nodes["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
    assert f"IBEX_DATA_DIR={mounted['data']}/" in image


def test_every_selector_finds_the_nodes_and_nothing_else() -> None:
    labels = find("", "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    others = [it["metadata"]["labels"] for it in render("") if it["kind"] == "Pod"]
    others.append(find("", "Job")["spec"]["template"]["metadata"]["labels"])
    selectors = [it["spec"]["selector"] for it in render("") if it["kind"] == "Service"]
    selectors.append(find("", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])

    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not any(selector.items() <= other.items() for other in others)


def test_migrations_run_before_the_nodes_with_their_network_open_before_them() -> None:
    hooks = {
        it["kind"]: it["metadata"].get("annotations", {})
        for it in (find("", "Job"), find("", "NetworkPolicy", "-migrate"))
    }

    assert {notes["helm.sh/hook"] for notes in hooks.values()} == {"pre-install,pre-upgrade"}
    assert int(hooks["NetworkPolicy"]["helm.sh/hook-weight"]) < int(hooks["Job"]["helm.sh/hook-weight"])


def test_the_number_of_nodes_is_the_autoscalers_when_there_is_one() -> None:
    assert "replicas" in find("", "StatefulSet")["spec"]
    assert "replicas" not in find("everything", "StatefulSet")["spec"]
    assert find("everything", "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"


def test_the_alerts_come_along_as_they_are() -> None:
    texts = [yaml.safe_load(path.read_text()) for path in sorted((INFRA / "prometheus/rules").glob("*.yaml"))]

    assert find("everything", "PrometheusRule")["spec"]["groups"] == [
        group for text in texts for group in text["groups"]
    ]
