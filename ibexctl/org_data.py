"""`ibexctl org export` and `org erase`: everything that is kept of an organization, taken out, or taken away."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ibex.domain.identity import DEV_ORG_ID, OrgId, parse_uuid
from ibex.errors import OperatorError, StoreError, UnknownEntity
from ibexctl.command import command, invocation_of
from ibexctl.identity import Org
from ibexctl.operation import operate, read_settings
from ibexctl.output import Answer, Fields, encode, is_terminal, note

if TYPE_CHECKING:
    from ibex.recorder.erasure import Erasure
    from ibex.runtime import Operator

STANDARD_OUTPUT = "-"

_PARTIAL = ".partial"


def register(organizations: typer.Typer) -> None:
    """Add the commands to `ibexctl org`."""
    examples = "ibexctl org export acme\nibexctl org export acme --to acme-in-november"
    command(organizations, "export", example=examples)(export_org)
    command(organizations, "erase", example="ibexctl org erase acme --yes")(erase_org)


def export_org(
    ctx: typer.Context,
    org: Org,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR", help="A new directory, or - for standard output.  [default: export-ID]"),
    ] = None,
) -> Answer | None:
    """Write everything that is kept of an organization as JSON Lines, a file for each kind of row.

    Only you can read the files. Digests of tokens are left out. With --to - all kinds go to standard output. It leaves
    an audit event; one that fails leaves no file.
    """
    is_piped = to == STANDARD_OUTPUT
    if is_piped and invocation_of(ctx).is_json:
        raise OperatorError(
            "Standard output cannot hold the export and the answer of --json.", hint="Give a directory: --to DIR."
        )

    async def act(operator: "Operator") -> tuple[OrgId, Path, Mapping[str, int]]:
        org_id = await operator.directory.find_org(org)
        directory = Path(to or f"export-{org_id}")
        with _standard_output() if is_piped else _new_files(directory) as files:
            return org_id, directory, await _write(operator, org_id, files)

    org_id, directory, counts = operate(act, clickhouse=True)
    if is_piped:
        note(", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
        return None
    data = {"org_id": org_id, "directory": str(directory.absolute()), "rows": counts}
    return Answer(data, (Fields({"directory": directory.absolute(), **counts}),))


def erase_org(
    org: Org, is_sure: Annotated[bool, typer.Option("--yes", help="Do not ask a person at a terminal first.")] = False
) -> Answer:
    """Delete an organization and everything that is kept of it, for ever: stores, Redis, and this node's journal.

    Its tokens are refused at once. Turns that are still under way, or in the journal of another node, are dropped when
    they arrive. One audit event stays. Cut short, it goes on when it is run again.
    """
    settings = read_settings()

    async def act(operator: "Operator") -> "tuple[OrgId, Erasure]":
        from ibex.recorder.erasure import erase_organization
        from ibex.stores.redis.tenant_keys import delete_tenant_keys

        org_id, name = await _find(operator, org)
        if org_id == DEV_ORG_ID:
            raise OperatorError(
                "The development organization is made anew at each start.",
                hint="Remove the data directory to begin again with nothing.",
            )
        if not is_sure:
            _ask(f"Erase organization {name or org_id} and everything that is kept of it, for ever?")
        erasure = await erase_organization(
            org_id,
            organizations=operator.eraser,
            traces=operator.traces.erasure,
            delete_keys=lambda org_id: delete_tenant_keys(operator.addresses.redis, org_id),
            tell=lambda: operator.publish((changed.kind, changed.entity_id) for changed in operator.eraser.changes),
            journal_dir=settings.journal_dir,
        )
        return org_id, erasure

    org_id, erasure = operate(act, settings=settings, clickhouse=True, redis=True)
    return Answer(
        {"org_id": org_id, **{name: getattr(erasure, name) for name in erasure.__slots__}},
        notes=("Backups, and exports you made, still hold it.",),
    )


async def _find(operator: "Operator", org: str) -> tuple[OrgId, str | None]:
    """The organization, and its name; without one: an id that was erased before, or never was."""
    try:
        org_id = await operator.directory.find_org(org)
    except UnknownEntity:
        erased = parse_uuid(org)
        if erased is None:
            raise
        return OrgId(erased), None
    return org_id, (await operator.directory.show_org(org_id))["name"]


def _ask(question: str) -> None:
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        raise OperatorError("Nobody is here to be asked whether to erase.", hint="Give --yes.")
    typer.confirm(question, abort=True, err=True)


async def _write(operator: "Operator", org_id: OrgId, files: Mapping[str, TextIO]) -> Mapping[str, int]:
    """Write each row to the file of its kind, and an audit event at the end; how many rows of each kind."""
    counts = dict.fromkeys(files, 0)
    try:
        async for kind, row in operator.export(org_id):
            files[kind].write(encode({"kind": kind, **row}) + "\n")
            counts[kind] += 1
    except BaseException:  # whatever cut it short: what has gone to standard output cannot be called back
        with suppress(StoreError):
            await operator.exports.note(org_id, counts, is_whole=False)
        raise
    await operator.exports.note(org_id, counts, is_whole=True)
    return counts


@contextmanager
def _standard_output() -> Iterator[Mapping[str, TextIO]]:
    from ibex.stores.export import KINDS

    yield dict.fromkeys(KINDS, sys.stdout)


@contextmanager
def _new_files(directory: Path) -> Iterator[Mapping[str, TextIO]]:
    """New files, for their owner alone. They have their names only when all are whole; else they are removed."""
    from ibex.stores.export import KINDS

    is_new = _make_private(directory)
    unfinished = {kind: directory / f"{kind}.jsonl{_PARTIAL}" for kind in KINDS}
    try:
        with ExitStack() as stack:
            yield {
                kind: stack.enter_context(open(path, "x", encoding="utf-8", opener=_open_private))
                for kind, path in unfinished.items()
            }
    except BaseException:  # an interrupt as well: they hold what the organization may not want lying about
        for path in unfinished.values():
            path.unlink(missing_ok=True)
        if is_new:
            directory.rmdir()
        raise
    for path in unfinished.values():
        path.rename(path.with_suffix(""))


def _make_private(directory: Path) -> bool:
    """Make a directory for its owner alone; False when there is one. Raises OperatorError if that is of no use."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
        return True
    if not directory.is_dir():
        raise OperatorError(f"{directory} is no directory.", hint="Give a new one with --to DIR.")
    names = sorted(path.name for path in directory.iterdir())
    if partial := [name for name in names if name.endswith(_PARTIAL)]:
        raise OperatorError(
            f"{directory} holds what an export that was killed has left: {', '.join(partial)}.",
            hint="They hold data of the organization: remove them, or give a new directory with --to DIR.",
        )
    if names:
        raise OperatorError(f"{directory} is not empty.", hint="Give a new directory with --to DIR.")
    if directory.stat().st_mode & 0o077:
        raise OperatorError(
            f"Not only you can enter {directory}.", hint="Make it mode 700, or give a new directory with --to DIR."
        )
    return False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
