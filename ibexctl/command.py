"""How a command is declared: a function that returns an Answer, with `--json` and an example added to it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ParamSpec

import typer

from ibexctl.help import Family, Leaf, ending
from ibexctl.output import Answer, show

P = ParamSpec("P")


@dataclass
class Invocation:
    """What holds for one run of the program, whatever the command."""

    is_json: bool = False


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def group(about: str) -> typer.Typer:
    """A family of commands; `--json` may stand before the command's name too."""
    app = typer.Typer(cls=Family, help=about, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

    @app.callback()
    def remember(ctx: typer.Context, is_json: JsonFlag = False) -> None:
        invocation_of(ctx).is_json |= is_json

    return app


def invocation_of(ctx: typer.Context) -> Invocation:
    """The run a command belongs to."""
    return ctx.ensure_object(Invocation)


def command(
    app: typer.Typer, name: str, *, example: str, exits: Mapping[int, str] | None = None
) -> Callable[[Callable[P, Answer | None]], Callable[P, None]]:
    """Declare a command of `app`. Its docstring is the help, `example` the help's last lines.

    `exits` says what exit codes mean, where that is more than that it worked or did not. What the function returns is
    printed; None means that it has printed its answer itself.
    """

    def declare(function: Callable[P, Answer | None]) -> Callable[P, None]:
        signature = inspect.signature(function, eval_str=True)
        takes_context = "ctx" in signature.parameters

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            ctx = kwargs["ctx"] if takes_context else kwargs.pop("ctx")
            invocation = invocation_of(ctx)  # type: ignore[arg-type]
            invocation.is_json |= bool(kwargs.pop("is_json"))
            answer = function(*args, **kwargs)
            if answer is not None:
                show(answer, is_json=invocation.is_json)
                if answer.exit_code:
                    raise typer.Exit(answer.exit_code)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in signature.parameters.values()]
        if not takes_context:
            parameters.append(inspect.Parameter("ctx", keyword, annotation=typer.Context))
        parameters.append(inspect.Parameter("is_json", keyword, annotation=JsonFlag, default=False))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, cls=Leaf, epilog=ending(example, exits or {}))(run)
        return run

    return declare
