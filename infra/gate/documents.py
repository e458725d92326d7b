"""What has to be written down: that it is there, has its parts, and agrees with the code."""

import re
import sys

from ibex.config import Settings, environment_names
from infra.gate.programs import ROOT, git, run_program
from infra.gate.proof import Proof, Status, judge

DECISIONS = range(22, 32)
TAG = "v0.2.0"


async def current_state() -> Proof:
    """CURRENT_STATE.md: what was delivered, each with evidence that exists, and what comes next."""
    path = ROOT / "docs/app/content/roadmap/CURRENT_STATE.md"
    text = path.read_text() if path.exists() else ""
    evidence = re.findall(r"`((?:tests|ibex|ibexctl|infra|docs|loadtests)/[\w./-]+)`", text)
    needed = ("## Delivered", "## Next", "`services/proxy/.env.example`")
    faults = [f"lacks {part}" for part in needed if part not in text]
    faults += [f"names {place}, which is not there" for place in evidence if not (ROOT / place).exists()]
    how = "its parts, and that each file it names as evidence is there"
    return judge(not faults and bool(evidence), how, "; ".join(faults) or f"{len(set(evidence))} files named")


async def development_guide() -> Proof:
    """DEVELOPMENT_GUIDE.md: the set-up of this phase, with embedded stores and with compose."""
    text = (ROOT / "docs/DEVELOPMENT_GUIDE.md").read_text()
    faults = [f"lacks {part}" for part in ("## Phase 2 set-up", "### Embedded", "### Compose") if part not in text]
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9-]+):.*## ", makefile, flags=re.MULTILINE)
    faults += [f"lacks make {target}" for target in targets if f"`make {target}`" not in text]
    how = "its sections on set-up, and every make target"
    return judge(not faults, how, "; ".join(faults) or f"both set-ups, {len(targets)} make targets")


async def decisions() -> Proof:
    """ADRs 0022 to 0031, each with its three parts and in the index."""
    directory = ROOT / "docs/adr"
    index = (directory / "README.md").read_text()
    faults = []
    for number in DECISIONS:
        found = list(directory.glob(f"{number:04}-*.md"))
        if len(found) != 1:
            faults.append(f"{number:04} is missing")
        elif not all(f"\n## {part}\n" in found[0].read_text() for part in ("Context", "Decision", "Consequences")):
            faults.append(f"{number:04} lacks a part")
        elif f"({found[0].name})" not in index:
            faults.append(f"{number:04} is not in the index")
    faults += ["the index lacks the earlier decisions" for _ in range("earlier decisions" not in index)]
    written = len(list(directory.glob("[0-9]*.md")))
    how = "each has context, decision and consequences, and stands in `docs/adr/README.md`"
    figure = f"{DECISIONS[0]:04} to {DECISIONS[-1]:04}, {written} in all"
    return judge(not faults, how, "; ".join(faults) or figure)


async def env_example() -> Proof:
    """`.env.example`: every setting, none that there is not."""
    listed = re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    names = [environment_names(field)[0] for field in Settings.model_fields]
    faults = [f"lacks {name}" for name in names if name not in listed]
    faults += [f"has {name}, which is no setting" for name in listed if name not in names]
    return judge(not faults, "compared with the settings model", "; ".join(faults) or f"{len(names)} settings")


async def others() -> Proof:
    """The rest of the documents: links, names, commands and what is generated, by the suite's own tests of them."""
    tests = ("tests/test_documents.py", "tests/test_code_blocks.py", "tests/test_openapi.py")
    done = await run_program(sys.executable, "-m", "pytest", "-q", *tests)
    how = "links, names, commands and what is generated, by the suite's own tests of documents"
    return judge(done.code == 0, how, done.out.strip().rpartition("\n")[2].strip("= "))


async def tag() -> Proof:
    """The tag is a person's act."""
    commit = await git("rev-list", "-n", "1", TAG)
    how = f"`git tag`; `make release-check` prints the command that a person runs for {TAG}"
    if commit:
        return Proof(Status.PASS, how, f"{TAG} is {commit[:12]}")
    return Proof(Status.PENDING, how, f"{TAG} is not set: a person's act")
