"""`make exit-gate`: proves every line, prints the table, writes docs/exit-gate.md; exits with 1 when a line fails."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ibex.config import reach_loopback_directly
from ibex.errors import OperatorError
from ibexctl.output import show_error
from ibexctl.trial import ending_on_sigterm
from infra.gate.checklist import make_checklist
from infra.gate.proof import Line
from infra.gate.report import PAGE, TITLE, as_data, as_page, as_text, exit_code, look_around
from infra.gate.running import run, say
from infra.gate.site import find_upstream, open_site


def choose(lines: Sequence[Line], only: Sequence[str]) -> list[Line]:
    """The lines whose title holds one of these texts; all of them when there are none."""
    return [line for line in lines if not only or any(text.lower() in line.title.lower() for text in only)]


async def hold_gate(arguments: argparse.Namespace) -> int:
    """Run it as the arguments say; the exit code."""
    upstream = find_upstream()
    circumstances = await look_around(upstream)
    lines = choose(make_checklist(arguments.jaeger), arguments.only)
    say(f"{len(lines)} lines to prove; upstream: {upstream.name}")
    results = await run(lines, partial(open_site, upstream), say)
    if arguments.write is not None:
        arguments.write.write_text(as_page(results, circumstances))
        say(f"wrote {arguments.write.name}")
    if arguments.json:
        sys.stdout.write(json.dumps(as_data(results, circumstances), ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n" + as_text(TITLE, results) + "\n")
    return exit_code(results)


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """What to prove and where to say it; a part of the checklist writes no page unless told where."""
    parser = argparse.ArgumentParser(prog="python -m infra.gate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="only the lines whose title holds this; no page"
    )
    parser.add_argument("--jaeger", metavar="URL", help="a Jaeger's query service, such as http://127.0.0.1:16686")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"the page; default {PAGE.name} for the whole list")
    arguments = parser.parse_args(words)
    if arguments.write is None and not arguments.only:
        arguments.write = PAGE
    return arguments


def main() -> int:
    """The program."""
    arguments = read_arguments(sys.argv[1:])
    reach_loopback_directly()
    try:
        with ending_on_sigterm():
            return asyncio.run(hold_gate(arguments))
    except OperatorError as error:
        show_error(error.message, error.hint, is_json=arguments.json)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
