"""`ibexctl org export` and `org erase`: everything that is kept of an organization, taken out, or taken away."""

import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ibex.domain.identity import DEV_ORG_ID, OrgId, parse_uuid
from ibex.errors import OperatorError, UnknownEntity
from ibexctl.command import command, invocation_of
from ibexctl.identity import Org
from ibexctl.operation import operate, read_settings
from ibexctl.output import Answer, Fields, encode, is_terminal, note

if TYPE_CHECKING:
    from ibex.recorder.erasure import Erasure
    from ibex.runtime import Operator
    from ibex.stores.export import Exported

STANDARD_OUTPUT = "-"


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

    Only you can read the files. Digests of tokens are left out. With --to - all kinds go to standard output.
    """
    is_piped = to == STANDARD_OUTPUT
    if is_piped and invocation_of(ctx).is_json:
        raise OperatorError(
            "Standard output cannot hold the export and the answer of --json.", hint="Give a directory: --to DIR."
        )

    async def act(operator: "Operator") -> tuple[OrgId, Path, Mapping[str, int]]:
        org_id = await operator.directory.find_org(org)
        directory = Path(to or f"export-{org_id}")
        write = _write_lines(operator.export(org_id)) if is_piped else _write_files(operator.export(org_id), directory)
        return org_id, directory, await write

    org_id, directory, counts = operate(act, clickhouse=True)
    if is_piped:
        note(", ".join(f"{count} {kind}" for kind, count in counts.items()))
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


async def _write_lines(rows: "AsyncIterator[Exported]") -> Mapping[str, int]:
    """All kinds to standard output; how many rows of each."""
    counts = Counter[str]()
    async for kind, row in rows:
        sys.stdout.write(encode({"kind": kind, **row}) + "\n")
        counts[kind] += 1
    return counts


async def _write_files(rows: "AsyncIterator[Exported]", directory: Path) -> Mapping[str, int]:
    """A file for each kind of row, empty ones too; how many rows each has."""
    from ibex.stores.export import KINDS

    with _new_files(directory, KINDS) as files:
        counts = dict.fromkeys(KINDS, 0)
        async for kind, row in rows:
            files[kind].write(encode({"kind": kind, **row}) + "\n")
            counts[kind] += 1
    return counts


@contextmanager
def _new_files(directory: Path, kinds: tuple[str, ...]) -> Iterator[Mapping[str, TextIO]]:
    """Files that were not there before, for their owner alone. They have their names only when they are whole."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise OperatorError(f"{directory} is not empty.", hint="Give a new directory with --to DIR.")
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(open(_unfinished(directory, kind), "x", encoding="utf-8", opener=_open_private))
            for kind in kinds
        }
    for kind in kinds:
        _unfinished(directory, kind).rename(directory / f"{kind}.jsonl")


def _unfinished(directory: Path, kind: str) -> Path:
    return directory / f"{kind}.jsonl.partial"


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
