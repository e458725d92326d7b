"""`make release-check`: whether this commit can be released; if so, the two commands that a person then runs."""

import asyncio
import sys
from collections.abc import Sequence

from ibexctl.trial import ending_on_sigterm
from infra.gate import packages, versions
from infra.gate.programs import ROOT, git
from infra.gate.proof import LoneLine, Proof, Result, judge
from infra.gate.report import PAGE, Page, as_text, exit_code, read_page
from infra.gate.running import run, say
from infra.gate.site import find_upstream, open_site


async def clean() -> Proof:
    """What is released is what is committed."""
    changed = (await git("status", "--porcelain")).splitlines()
    return judge(not changed, "`git status`", f"{len(changed)} paths changed" if changed else "clean")


async def gate() -> Proof:
    """The gate's page has no failure, and tells of this tree: since its commit nothing but the page has changed."""
    page = read_page()
    changed = [] if page is None else (await git("diff", "--name-only", page.commit, "HEAD")).splitlines()
    is_known = page is not None and bool(await git("cat-file", "-t", page.commit))
    return judge_page(page if is_known else None, [path for path in changed if path != str(PAGE.relative_to(ROOT))])


def judge_page(page: Page | None, changed: list[str]) -> Proof:
    """The same of any page, and of what has changed since its commit."""
    how = "docs/exit-gate.md: no line failed, and it tells of this very tree"
    if page is None:
        return judge(False, how, "there is no page of a commit known here: run `make exit-gate` and commit it")
    if not page.is_passed:
        return judge(False, how, f"a line failed at {page.commit[:12]}")
    if page.is_dirty or changed:
        why = "on changes that are in no commit" if page.is_dirty else f"and {len(changed)} files changed since then"
        return judge(False, how, f"passed at {page.commit[:12]}, {why}: run `make exit-gate` again")
    return judge(True, how, f"passed at {page.commit[:12]}")


LINES = (
    LoneLine("State", "Nothing is uncommitted", clean),
    LoneLine("State", "The exit gate is green", gate),
    LoneLine("Versions", "Versions agree", versions.agree),
    LoneLine("Versions", "CHANGELOG is dated", versions.changelog),
    LoneLine("Packages", "The sdist gives the wheel", packages.sdist_gives_the_wheel),
    LoneLine("Packages", "The wheel serves", packages.wheel_serves),
)


async def check() -> int:
    """Prove every line, say how they stand, and what comes next; the exit code."""
    results = await run(LINES, lambda: open_site(find_upstream()), say)
    version = versions.read_version()
    table = as_text(f"Release of ibex {version}", results)
    sys.stdout.write(f"\n{table}\n\n{tell_next(results, version)}\n")
    return exit_code(results)


def tell_next(results: Sequence[Result], version: str) -> str:
    """What a person does now: the two commands of a release, only when nothing stands against it."""
    if exit_code(results):
        return "No release yet: mend what failed, and run `make release-check` again."
    tag, push = f'git tag -s v{version} -m "ibex {version}"', f"git push origin v{version}"
    return f"A person who may release runs:\n\n  {tag}\n  {push}"


def main() -> int:
    """The program."""
    with ending_on_sigterm():
        return asyncio.run(check())


if __name__ == "__main__":
    sys.exit(main())
