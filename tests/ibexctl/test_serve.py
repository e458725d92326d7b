"""`ibexctl serve`, `status` and `smoke`, and the smoke script: a whole server, as a newcomer starts it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ibex.config import load_settings
from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from ibex.errors import OperatorError
from ibex.server.supervision.status import NodeStatus
from ibexctl.proxy import Proxy
from ibexctl.serve import describe
from tests.conftest import new_data_dir
from tests.ibexctl.conftest import Outcome, run_apart

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra" / "scripts" / "e2e_smoke_p2.sh"
PROGRAM = Path(sys.executable).with_name("ibexctl")


@dataclass(frozen=True, slots=True)
class Server:
    """A server started by `ibexctl serve`, and what it said until it was ready."""

    said: str
    environ: dict[str, str]

    @property
    def url(self) -> str:
        """Where it listens."""
        found = re.search(r"serves on (http://\S+)", self.said)
        assert found
        return found[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of one worker on a free port with everything embedded; it must stop whole when it is interrupted."""
    with new_data_dir() as data_dir:
        environ = {"IBEX_DATA_DIR": str(data_dir), "IBEX_ENV_FILE": os.devnull, "IBEX_LOG_LEVEL": "warning"}
        words = [sys.executable, "-m", "ibexctl", "serve", "--port", "0", "--workers", "1"]
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("IBEX_", "OPENAI_"))}
        process = subprocess.Popen(
            words, env=outside | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail(f"the server did not start: {process.communicate()[1]}")
        try:
            yield Server(said, environ)
        finally:
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert rest == ""
        assert DEV_TOKEN not in errors
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(data_dir) not in running


def test_the_start_print_names_the_stand_in_and_where_data_lies(server: Server) -> None:
    assert f"data\t{server.environ['IBEX_DATA_DIR']} (new)\n" in server.said
    assert "clickhouse\tembedded ClickHouse (chDB), for development and trials" in server.said
    assert "upstream\tthe ibex sandbox: a STAND-IN" in server.said
    assert server.said.count(DEV_TOKEN) == 1


def test_real_stores_and_a_real_upstream_are_named_without_their_secrets() -> None:
    settings = load_settings(
        {
            "IBEX_ENV_FILE": os.devnull,
            "IBEX_ENV": "production",
            "OPENAI_API_KEY": "sk-hush",
            "IBEX_POSTGRES_DSN": "postgresql://ibex_app:hush@db.internal:5433/ibex?sslmode=require",
            "IBEX_REDIS_URL": "rediss://:hush@cache.internal/2",
            "IBEX_CLICKHOUSE_DSN": "http://ibex:hush@traces.internal:8123/ibex",
        }
    )
    node = NodeStatus(
        version="1.0",
        env="production",
        url="http://10.0.0.1:8080",
        metrics_url="http://127.0.0.1:9464/metrics",
        data_dir="/data",
        llm_mode="live",
        upstream="https://api.openai.com/v1",
        started_at="2026-01-01T00:00:00.000Z",
        uptime_seconds=1.0,
        is_first_start=False,
        engines=[],
        processes=[],
    )
    answer = describe(node, settings)
    assert answer.data["stores"] == {
        "postgres": "postgresql://db.internal:5433/ibex",
        "redis": "rediss://cache.internal/2",
        "clickhouse": "http://traces.internal:8123/ibex",
    }
    assert answer.data["upstream"] == {"url": "https://api.openai.com/v1", "mode": "live", "is_stand_in": False}
    shown = f"{answer.data} {answer.views}"
    assert "hush" not in shown
    assert DEV_TOKEN not in shown


def test_the_printed_line_works_as_pasted(server: Server) -> None:
    line = server.said.partition("Try it:\n\n")[2].partition("\n\n")[0]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert '"content":"hello"' in done.stdout


def test_status_shows_the_process_tree(server: Server) -> None:
    shown = run_apart("status", "--json", **server.environ)
    assert shown.data["url"] == server.url
    assert [process["name"] for process in shown.data["processes"]][:1] == ["supervisor"]
    assert {"worker 0", "recorder", "sandbox"} <= {process["name"] for process in shown.data["processes"]}
    assert all(process["is_up"] for process in shown.data["processes"])
    shown = run_apart("status", **server.environ).out
    assert "worker 0\t" in shown
    assert "in_flight\t0\n" in shown
    assert re.search(r"^engines\tPostgreSQL [\d.]+, Valkey ", shown, flags=re.MULTILINE)
    assert re.search(r"^journal\t(\d+ turns wait|the recorder has not said yet)", shown, flags=re.MULTILINE)


def test_status_without_a_server_fails_and_says_how_to_start_one(ibexctl) -> None:
    refused = ibexctl("status", "--json").error
    assert "No ibex server" in refused["message"]
    assert "ibexctl serve" in refused["hint"]


def test_a_second_server_on_the_same_data_directory_is_refused(server: Server) -> None:
    refused = run_apart("serve", "--port", "0", "--json", **server.environ).error
    assert server.environ["IBEX_DATA_DIR"] in refused["message"]
    assert refused["hint"]


def test_a_port_that_is_taken_is_named(server: Server, data_dir: Path) -> None:
    port = server.url.rpartition(":")[2]
    environ = server.environ | {"IBEX_DATA_DIR": str(data_dir)}
    refused = run_apart("serve", "--port", port, "--json", **environ).error
    assert port in refused["message"]
    assert "--port" in refused["hint"]


def test_commands_work_on_the_running_server_and_it_hears_of_changes(server: Server) -> None:
    org_id = run_apart("org", "create", "acme", "--json", **server.environ).data["org_id"]
    agent_id = run_apart("agent", "register", "bot", "--org", org_id, "--json", **server.environ).data["agent_id"]
    token = run_apart("token", "mint", "--org", org_id, "--json", **server.environ).data
    proxy = Proxy(server.url, token["token"], agent_id)
    question = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Reply with exactly: hi"}]}
    assert proxy.chat(question, session_id="s").json()["choices"][0]["message"]["content"] == "hi"
    assert run_apart("token", "revoke", token["prefix"], **server.environ).code == 0

    def ask_until_refused() -> None:
        for _ in range(50):
            proxy.chat(question, session_id="s")
            time.sleep(0.2)

    with pytest.raises(OperatorError, match="401 INVALID_TOKEN"):
        ask_until_refused()


def test_smoke_passes_and_looks_into_the_record(server: Server) -> None:
    done = run_apart("smoke", "--json", **server.environ)
    assert done.code == 0, done
    assert done.data["upstream"] == "sandbox"
    assert [(check["name"], check["result"]) for check in done.data["checks"]] == [
        ("health", "passed"),
        ("completion", "passed"),
        ("stream", "passed"),
        ("record", "passed"),
    ]


def test_smoke_skips_the_record_where_the_stores_are_out_of_reach(server: Server, ibexctl) -> None:
    done = ibexctl("smoke", "--addr", server.url, "--json")
    assert done.code == 0
    assert done.data["checks"][-1]["result"] == "skipped"
    assert "no store access" in done.data["checks"][-1]["detail"]
    assert "stand-in" in ibexctl("smoke", "--addr", server.url).out


def test_smoke_says_what_to_do_when_it_fails(server: Server, ibexctl, environment) -> None:
    environment.setenv("IBEX_DEV_TOKEN", "not-a-token")
    done = ibexctl("smoke", "--addr", server.url)
    assert done.code == 1
    assert "401 INVALID_TOKEN" in done.out
    assert "ibexctl token mint" in done.err
    assert "not-a-token" not in done.out + done.err
    refused = ibexctl("smoke", "--addr", "http://127.0.0.1:1", "--json").data
    assert refused["passed"] is False
    assert "Nothing answers" in refused["checks"][0]["detail"]
    assert ibexctl("smoke", "--addr", "nowhere", "--json").data["checks"][0]["result"] == "failed"
    assert ibexctl("smoke", "--agent", "nobody", "--json").code == 2


def test_smoke_can_bring_a_server_of_its_own(ibexctl) -> None:
    done = ibexctl("smoke", "--self-contained", "--json")
    assert done.code == 0, done
    assert {check["result"] for check in done.data["checks"]} == {"passed"}


def run_script(**environ: str) -> Outcome:
    """Run the smoke script with nothing in the environment but what is given."""
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "IBEX_ENV_FILE": os.devnull}
    done = subprocess.run(
        [str(SCRIPT)], env=base | environ, capture_output=True, text=True, timeout=100, check=False, cwd="/"
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_script_needs_a_key() -> None:
    done = run_script()
    assert done.code == 1
    assert done.err == "OPENAI_API_KEY is required for Phase 2 e2e smoke\n"


def test_the_script_passes_and_never_shows_the_token_in_arguments(server: Server, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    assert curl
    spy = tmp_path / "curl"
    spy.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\nexec {curl} "$@"\n')
    spy.chmod(0o755)
    environ = server.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "IBEXCTL": str(PROGRAM)}
    done = run_script(OPENAI_API_KEY="sk-none", IBEX_PROXY_ADDR=server.url, **environ)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert lines[0] == "=== Phase 2 E2E Smoke Test ==="
    assert "Provider response received." in lines
    assert "PASS: completion of the ibex sandbox (a stand-in, not OpenAI) received and validated" in lines
    assert "PASS: 2 checkpoints in the session, 2 traces, all whole" in lines
    assert lines[-1] == "=== Phase 2 E2E Smoke: PASSED ==="
    arguments = (tmp_path / "arguments").read_text()
    assert "gpt-4o-mini" in arguments
    for secret in (DEV_TOKEN, "sk-none"):
        assert secret not in arguments + done.out + done.err


def test_the_script_skips_the_record_where_the_stores_are_out_of_reach(server: Server, data_dir: Path) -> None:
    where = {"IBEX_PROXY_ADDR": server.url, "IBEX_DATA_DIR": str(data_dir), "IBEXCTL": str(PROGRAM)}
    done = run_script(OPENAI_API_KEY="sk-none", **where)
    assert done.code == 0, done
    assert "Checkpoints and traces: SKIPPED (no store access)" in done.out
    assert list(data_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "message", "remedy"),
    [
        ({"IBEX_PROXY_ADDR": "http://127.0.0.1:1"}, "Nothing answers at http://127.0.0.1:1", "make run"),
        ({"IBEX_DEV_TOKEN": "ibex_pat_wrong"}, "401 INVALID_TOKEN", "ibexctl token mint"),
        ({"IBEX_DEV_AGENT_ID": str(DEV_AGENT_ID)[:-1] + "9"}, "403 AGENT_NOT_AUTHORIZED", "IBEX_DEV_AGENT_ID"),
        ({"IBEX_DEV_TOKEN": 'a"b'}, "a character that no token has", "ibexctl token mint"),
    ],
)
def test_the_script_says_what_to_do_when_it_fails(
    server: Server, environ: dict[str, str], message: str, remedy: str
) -> None:
    done = run_script(**{"OPENAI_API_KEY": "sk-none", "IBEX_PROXY_ADDR": server.url, **environ})
    assert done.code == 1
    assert message in done.err
    assert remedy in done.err
    assert "PASSED" not in done.out
