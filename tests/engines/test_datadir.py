"""The data directory: private, held by one, and cleaned of what a dead holder left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ibex.engines.datadir import DataDirectory
from ibex.engines.processes import ProcessIdentity
from ibex.errors import ConfigurationError, DataDirectoryLocked


@pytest.fixture
def directory(data_dir: Path) -> DataDirectory:
    directory = DataDirectory(data_dir)
    directory.prepare()
    return directory


def test_everything_in_it_is_private(directory: DataDirectory) -> None:
    with directory.lock():
        directory.write_run_file("facts.json", {"a": 1})
        directory.password("store")
    for path in (directory.path, *directory.path.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_empty_directory_is_closed_to_others(data_dir: Path) -> None:
    data_dir.chmod(0o755)
    DataDirectory(data_dir).prepare()
    assert data_dir.stat().st_mode & 0o777 == 0o700


def test_a_directory_of_others_is_refused_and_left_as_it_is(data_dir: Path) -> None:
    (data_dir / "notes.txt").write_text("mine")
    data_dir.chmod(0o755)
    with pytest.raises(ConfigurationError, match="holds files that are not ibex's"):
        DataDirectory(data_dir).prepare()
    assert data_dir.stat().st_mode & 0o777 == 0o755


def test_a_file_in_its_place_is_explained(data_dir: Path) -> None:
    (data_dir / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used: Not a directory"):
        DataDirectory(data_dir / "file" / "below").prepare()


def test_a_second_holder_is_told_the_first_ones_pid(directory: DataDirectory) -> None:
    script = (
        "import sys, pathlib; from ibex.engines.datadir import DataDirectory\n"
        "with DataDirectory(pathlib.Path(sys.argv[1])).lock('command'): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(directory.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(DataDirectoryLocked, match=f"process {first.pid}") as caught, directory.lock():
            pass
        assert "ibexctl command" in str(caught.value)
        first.kill()
    with directory.lock():  # the dead one's lock is gone with it
        holder = directory.holder()
        assert holder is not None
        assert holder.process == ProcessIdentity.own()
    assert directory.holder() is None


def test_a_lock_file_naming_a_reused_pid_names_nobody(directory: DataDirectory) -> None:
    (directory.run_dir / "lock").write_text(json.dumps({"role": "serve", "pid": os.getpid(), "started": "long ago"}))
    assert directory.holder() is None


def test_a_password_is_made_once(directory: DataDirectory) -> None:
    password = directory.password("store")
    assert password == DataDirectory(directory.path).password("store")
    assert password != directory.password("another")
    assert len(password) >= 32


def test_what_a_dead_holder_left_running_is_stopped(directory: DataDirectory) -> None:
    pid = _leave_a_child(directory, "sleep(1000)", "stubborn")
    assert directory.stop_leftovers() == ["stubborn"]
    assert ProcessIdentity.of(pid) is None
    assert directory.stop_leftovers() == []


def test_a_leftover_that_will_not_go_is_killed(directory: DataDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibex.engines.datadir._LEFTOVER_SECONDS", 0.2)
    pid = _leave_a_child(directory, "sleep(1000)", "stubborn", ignores_sigterm=True)
    assert directory.stop_leftovers() == ["stubborn"]
    assert ProcessIdentity.of(pid) is None


def test_a_process_that_only_has_a_leftovers_pid_is_left_alone(directory: DataDirectory) -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as stranger:
        entry = {"name": "worker", "pid": stranger.pid, "started": "before", "signal": signal.SIGKILL, "parent": 1}
        directory.write_run_file("children.json", [entry])
        assert directory.stop_leftovers() == []
        assert stranger.poll() is None
        stranger.kill()


def test_own_children_are_no_leftovers(directory: DataDirectory) -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as child:
        directory.record_child("worker", child.pid)
        assert directory.stop_leftovers() == []
        assert child.poll() is None
        child.kill()
    directory.forget_child(child.pid)
    assert directory.read_run_file("children.json") == []


def test_a_long_path_has_its_sockets_elsewhere(data_dir: Path) -> None:
    directory = DataDirectory(data_dir / ("long" * 20))
    directory.prepare()
    assert directory.socket_dir != directory.run_dir
    assert directory.socket_dir.stat().st_mode & 0o777 == 0o700
    directory.remove_socket_dir()
    assert directory.run_dir.exists()


def _leave_a_child(directory: DataDirectory, code: str, name: str, *, ignores_sigterm: bool = False) -> int:
    """A recorded child of a process that has died; the pid of the child."""
    child = f"from time import sleep; import signal; {'signal.signal(15, signal.SIG_IGN);' if ignores_sigterm else ''}"
    child += f"print(flush=True); {code}"
    script = (
        "import subprocess, sys, pathlib; from ibex.engines.datadir import DataDirectory\n"
        "command = [sys.executable, '-c', sys.argv[2]]\n"
        "pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}\n"
        "child = subprocess.Popen(command, start_new_session=True, **pipes)\n"
        "child.stdout.readline()\n"
        "DataDirectory(pathlib.Path(sys.argv[1])).record_child(sys.argv[3], child.pid)\n"
        "print(child.pid)"
    )
    command = [sys.executable, "-c", script, str(directory.path), child, name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
