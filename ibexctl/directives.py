"""`ibexctl directive`: the instruction woven into each request of an agent."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from ibex.domain.identity import AgentId
from ibex.errors import OperatorError
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.identity import listing
from ibexctl.operation import change, operate
from ibexctl.output import Answer, Fields, printable

if TYPE_CHECKING:
    from ibex.runtime import Operator

app = group("Directives: what is woven into an agent's requests.")

Mode = Literal["system_first", "system_append", "user_prepend"]
"""The values of `ibex.domain.directives.DirectiveMode`, which is too heavy to import for --help."""

Agent = Annotated[UUID, typer.Argument(metavar="AGENT", parser=arguments.identifier, help="The agent's id.")]

Version = Annotated[int | None, typer.Option("--version", metavar="N", min=1, help="Else: the one in force.")]

_AN_AGENT = "00000000-0000-0000-0000-000000000003"
_EXAMPLE = """\
ibexctl directive set 00000000-0000-0000-0000-000000000003 --text "Answer in French."
ibexctl directive set 00000000-0000-0000-0000-000000000003 --file directive.txt --mode system_append
git show HEAD:directive.txt | ibexctl directive set 00000000-0000-0000-0000-000000000003"""


@command(app, "set", example=_EXAMPLE)
def set_directive(
    agent: Agent,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help="The directive itself.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A file that holds it; - is standard input.")
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option("--mode", help="Before all system messages, after them, or in the first user message."),
    ] = "system_first",
) -> Answer:
    """Put a new version of an agent's directive in force. The text comes from --text, --file or standard input.

    It is woven into every request of the agent, within a second while Redis is up, else within 5 s. Versions never
    change: `directive rollback` puts an older one in force again.
    """
    from ibex.domain.directives import DirectiveMode, check_directive_text

    directive = arguments.read_text(text, file)
    fault = check_directive_text(directive)
    if fault is not None:
        raise OperatorError(fault, hint="A directive is 1 to 32,768 bytes of UTF-8.")
    agent_id = AgentId(agent)

    async def act(operator: "Operator") -> int:
        return await operator.directives.set(agent_id, directive, DirectiveMode(mode))

    version = change(act)
    return Answer({"agent_id": agent_id, "version": version, "mode": mode})


@command(app, "show", example=f"ibexctl directive show {_AN_AGENT} --version 2")
def show_directive(agent: Agent, version: Version = None) -> Answer:
    """Show an agent's directive: the version in force, or another."""
    row = operate(lambda operator: operator.directives.read(AgentId(agent), version))
    facts = {name: value for name, value in row.items() if name != "text"}
    return Answer(row, (Fields(facts), "", printable(row["text"], keep_lines=True)))


@command(app, "history", example=f"ibexctl directive history {_AN_AGENT}")
def list_directives(agent: Agent) -> Answer:
    """List every version of an agent's directive, oldest first."""
    rows = operate(lambda operator: operator.directives.list_versions(AgentId(agent)))
    return listing("versions", ("version", "is_in_force", "mode", "sha256", "created_at"), rows)


@command(app, "diff", example=f"ibexctl directive diff {_AN_AGENT} --from 1 --to 2")
def compare_directives(
    agent: Agent,
    old: Annotated[int, typer.Option("--from", metavar="N", min=1, help="The older version.")],
    new: Annotated[
        int | None, typer.Option("--to", metavar="N", min=1, help="The newer version. Else: the one in force.")
    ] = None,
) -> Answer:
    """Show what changed between two versions, line by line."""
    from difflib import unified_diff

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        return [await operator.directives.read(AgentId(agent), version) for version in (old, new)]

    before, after = operate(act)
    older, newer = (f"version {row['version']} ({row['mode']})" for row in (before, after))
    lines = list(unified_diff(before["text"].splitlines(), after["text"].splitlines(), older, newer, lineterm=""))
    data = {"agent_id": agent, "from": before["version"], "to": after["version"], "diff": "\n".join(lines)}
    return Answer(data, ("\n".join(printable(line) for line in lines) or "The texts are the same.",))


@command(app, "rollback", example=f"ibexctl directive rollback {_AN_AGENT} --version 1")
def roll_back_directive(
    agent: Agent,
    version: Annotated[int, typer.Option("--version", metavar="N", min=1, help="The version to put in force again.")],
) -> Answer:
    """Put an older version in force again; the newer ones stay."""
    in_force = change(lambda operator: operator.directives.roll_back(AgentId(agent), version))
    return Answer({"agent_id": agent, "version": in_force})


@command(app, "clear", example=f"ibexctl directive clear {_AN_AGENT}")
def clear_directive(agent: Agent) -> Answer:
    """Let an agent have no directive. Its versions stay, for a rollback."""
    change(lambda operator: operator.directives.clear(AgentId(agent)))
    return Answer({"agent_id": agent, "version": None})
