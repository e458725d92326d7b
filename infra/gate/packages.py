"""The wheel and the sdist: built as a release builds them, and tried where there is neither checkout nor settings."""

import hashlib
import os
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ibex.config import child_environment, load_settings
from infra.gate.programs import ROOT, ProgramFailed, ctl, git, run_program
from infra.gate.proof import Proof, judge
from infra.gate.versions import read_version


async def sdist_gives_the_wheel() -> Proof:
    """The sdist alone is enough to build the very wheel that the checkout gives."""
    with TemporaryDirectory(prefix="ibex-release-") as directory:
        work = Path(directory)
        wheel = await _build("wheel", ROOT, work / "wheel")
        sdist = await _build("sdist", ROOT, work / "sdist")
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "unpacked", filter="data")
        (unpacked,) = (work / "unpacked").iterdir()
        again = await _build("wheel", unpacked, work / "again")
        ours, theirs = _digests(wheel), _digests(again)
    how = "`hatchling build` of both, and of a wheel from the sdist: the same files, byte for byte"
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    figure = f"{len(different)} files differ: {', '.join(different[:5])}" if different else f"{len(ours)} files"
    return judge(not different, how, figure)


async def wheel_serves() -> Proof:
    """The wheel in an environment of its own, with what the lock names and nothing of the checkout."""
    async with _installed_wheel() as (program, elsewhere):
        environ = _plain_environment()
        version = (await ctl("version", environ=environ, program=[program], cwd=elsewhere))["version"]
        smoke = await ctl("smoke", "--self-contained", environ=environ, program=[program], cwd=elsewhere)
        left = [path.name for path in elsewhere.iterdir()]
    checks = [check for check in smoke["checks"] if check["result"] == "passed"]
    how = (
        "installed from the lock into a new environment; `ibexctl version`, and `ibexctl smoke --self-contained`,"
        " which migrates embedded stores and serves from them"
    )
    figure = f"{version}, {len(checks)} of {len(smoke['checks'])} checks" + (f", left behind: {left}" if left else "")
    return judge(version == read_version() and smoke["passed"] and not left, how, figure)


@asynccontextmanager
async def _installed_wheel() -> AsyncIterator[tuple[Path, Path]]:
    """Its `ibexctl`, and an empty directory to run it in."""
    with TemporaryDirectory(prefix="ibex-release-") as directory:
        work = Path(directory)
        wheel = await _build("wheel", ROOT, work / "wheel")
        uv = Path(sys.executable).with_name("uv")
        environment = work / "environment"
        await _must(uv, "venv", "--quiet", "--python", sys.executable, environment)
        install = (uv, "pip", "install", "--quiet", "--python", environment / "bin/python")
        await _must(*install, "--require-hashes", "-r", ROOT / "requirements.lock")
        await _must(*install, "--no-deps", wheel)
        elsewhere = work / "elsewhere"
        elsewhere.mkdir()
        yield environment / "bin/ibexctl", elsewhere


async def _build(kind: str, source: Path, target: Path) -> Path:
    """Built as the release's workflow does: the time of the commit is the time of every file."""
    environ = dict(os.environ) | {"SOURCE_DATE_EPOCH": await git("log", "-1", "--format=%ct")}  # noqa: TID251
    await _must(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target, environ=environ, cwd=source)
    return next(target.iterdir())  # noqa: ASYNC240 - one look at a new directory


async def _must(*words: str | Path, environ: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
    done = await run_program(*words, environ=environ, cwd=cwd)
    if done.code != 0:
        raise ProgramFailed(f"{Path(words[0]).name} {words[1]} exited with {done.code}: {done.last_words}")


def _digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def _plain_environment() -> dict[str, str]:
    """No settings, and nothing that would let the checkout be imported."""
    environ = child_environment(load_settings({"IBEX_ENV_FILE": os.devnull}), with_provider_keys=False)
    return {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
