"""The sandbox as a process of its own: `python -m ibex.sandbox --port 9999`."""

import argparse
import asyncio
import signal
import ssl
import sys

import setproctitle
import uvloop

from ibex.sandbox.server import Sandbox


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    context = None
    if arguments.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.certificate)
    options = {"host": arguments.host, "port": arguments.port, "gap_ms": arguments.gap_ms, "api_key": arguments.key}
    async with Sandbox.serve(**options, ssl_context=context) as sandbox:
        sys.stdout.write(f"ibex sandbox (no model: it answers by rule) on {sandbox.base_url}\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """The process's entry."""
    parser = argparse.ArgumentParser(prog="python -m ibex.sandbox", description="An OpenAI-compatible stand-in.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, which is printed")
    parser.add_argument("--gap-ms", type=float, default=0.0, help="between two stream events")
    parser.add_argument("--key", help="the only API key accepted; default: any")
    parser.add_argument("--certificate", help="a PEM file with a key and its certificate: speak TLS")
    setproctitle.setproctitle("ibex: sandbox")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
