"""The rules of the tree that no linter knows: sentences at the top of modules, their size, the contracts, the locks."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for place in ("ibex", "ibexctl", "infra", "loadtests", "tests") for path in (ROOT / place).rglob("*.py")
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_LINES = 400


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_a_module_opens_with_a_sentence_and_holds_one_idea(path: Path) -> None:
    text = path.read_text()
    first_line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]

    assert first_line, "no docstring"
    length = text.count("\n")
    assert length <= MAX_LINES


def test_the_layers_are_a_contract_that_names_every_module() -> None:
    contracts = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    layers = {name for layer in contracts["layers"]["layers"] for name in re.split(r"\s*\|\s*", layer)}

    assert set(contracts) == {"layers", "command-line", "domain", "drivers", "edge", "cycles"}
    assert contracts["layers"]["exhaustive"] is True
    assert layers == {
        path.stem for path in (ROOT / "ibex").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-uv.lock", "requirements-clients.lock"])
def test_a_lock_has_a_hash_for_every_package_and_names_no_address(name: str) -> None:
    text = (ROOT / name).read_text()

    assert "://" not in text
    assert text.count("==") > 0
    for package in re.split(r"\n(?=[a-z])", text):
        assert "--hash=sha256:" in package, package.partition(" ")[0]


def test_the_lock_satisfies_every_requirement_of_the_project() -> None:
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["embedded"],
        *PYPROJECT["dependency-groups"]["dev"],
    ]
    lock = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", lock, flags=re.MULTILINE))

    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
