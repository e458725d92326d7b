"""`ibexctl directive`: the instruction woven into each request of an agent."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

from ibex.domain.identity import AgentId
from ibex.errors import OperatorError
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.operation import change
from ibexctl.output import Answer

if TYPE_CHECKING:
    from ibex.runtime import Operator

app = group("Directives: what is woven into an agent's requests.")

Mode = Literal["system_first", "system_append", "user_prepend"]
"""The values of `ibex.domain.directives.DirectiveMode`, which is too heavy to import for --help."""

Agent = Annotated[UUID, typer.Argument(metavar="AGENT", parser=arguments.identifier, help="The agent's id.")]

_EXAMPLE = """\
ibexctl directive set 00000000-0000-0000-0000-000000000003 --text "Answer in French."
ibexctl directive set 00000000-0000-0000-0000-000000000003 --file directive.txt --mode system_append
git show HEAD:directive.txt | ibexctl directive set 00000000-0000-0000-0000-000000000003"""


@command(app, "set", example=_EXAMPLE)
def set_directive(
    agent: Agent,
    text: Annotated[str | None, typer.Option("--text", help="The directive itself.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file that holds it; - is standard input.")] = None,
    mode: Annotated[
        Mode,
        typer.Option("--mode", help="Before all system messages, after them, or in the first user message."),
    ] = "system_first",
) -> Answer:
    """Put a new version of an agent's directive in force. The text comes from --text, --file or standard input."""
    from ibex.domain.directives import DirectiveMode, check_directive_text

    directive = arguments.read_text(text, file)
    fault = check_directive_text(directive)
    if fault is not None:
        raise OperatorError(fault, hint="A directive is 1 to 32,768 bytes of UTF-8.")
    agent_id = AgentId(agent)

    async def act(operator: "Operator") -> int:
        return await operator.directives.set(agent_id, directive, DirectiveMode(mode))

    version = change(act, lambda _version: [("directive", agent_id)])
    return Answer({"agent_id": agent_id, "version": version, "mode": mode})
