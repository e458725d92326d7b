"""The documents say what the code does: settings, metrics, errors are complete, and every pointer leads somewhere."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ibex.config import Settings, environment_names, load_settings
from ibex.errors import RequestError
from ibex.telemetry import Metrics

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
ADRS = sorted(DOCS.glob("adr/[0-9]*.md"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_is_written_from_the_code_is_current() -> None:
    script = [sys.executable, "infra/scripts/write_reference.py", "--check"]
    outcome = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert outcome.returncode == 0, outcome.stderr


def test_every_setting_is_in_the_example_with_one_line_of_help_above_it() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()

    for field, info in Settings.model_fields.items():
        (place,) = [k for k, line in enumerate(lines) if line.startswith(f"#{environment_names(field)[0]}=")]
        assert lines[place - 1].startswith(f"# {info.description}")


def test_the_example_uncommented_gives_the_defaults(tmp_path: Path) -> None:
    settings_file = tmp_path / "env"
    settings_file.write_text(re.sub(r"^#(?=IBEX_)", "", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    assert settings_file.read_text().count("\nIBEX_") == len(Settings.model_fields)

    assert load_settings({"IBEX_ENV_FILE": str(settings_file)}) == Settings()


def test_every_environment_name_is_in_the_configuration_page() -> None:
    page = (DOCS / "configuration.md").read_text()

    assert [n for field in Settings.model_fields for n in environment_names(field) if f"`{n}`" not in page] == []


def test_every_metric_is_in_the_metrics_page() -> None:
    page = (DOCS / "metrics.md").read_text()

    assert [metric.name for metric in Metrics() if f"`{metric.name}`" not in page] == []


def test_every_metric_the_documents_name_exists() -> None:
    known = {metric.name for metric in Metrics()}

    for path in DOCUMENTS:
        named = re.findall(r"`(ibex_(?:proxy|clickhouse|db|process|build|otel|store|event)_[a-z_]+)", path.read_text())
        assert set(named) - known <= {"ibex_proxy_"}, path.name


def test_every_error_code_is_in_the_errors_page() -> None:
    page = (DOCS / "errors.md").read_text()

    assert [error.code for error in RequestError.__subclasses__() if f"`{error.code}`" not in page] == []


def test_the_security_page_says_what_each_dependency_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = chain(project["dependencies"], *project["optional-dependencies"].values())
    section = (DOCS / "security.md").read_text().partition("\n## Dependencies\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z].+?) \| .+ \|$", section, flags=re.MULTILINE)

    assert sorted(chain(*(row.split(", ") for row in rows))) == sorted(Requirement(line).name for line in required)


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()

    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in readme] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_files_and_make_targets_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    assert set(re.findall(r"`make ([a-z0-9-]+)[ `]", text)) <= targets
    files = re.findall(r"`((?:ibex|ibexctl|infra|docs|tests|loadtests|\.ci)/[\w./-]*)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_documented_make_target_is_in_the_guide() -> None:
    guide = (DOCS / "DEVELOPMENT_GUIDE.md").read_text()
    targets = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)

    assert [target for target in targets if f"| `make {target}` |" not in guide] == []


@pytest.mark.parametrize("path", ADRS, ids=names(ADRS))
def test_a_decision_record_is_listed_and_has_its_three_parts(path: Path) -> None:
    text = path.read_text()

    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert f"({path.name})" in (DOCS / "adr" / "README.md").read_text()
