"""What a process of a node does first, under odd circumstances."""

import shlex
import subprocess
import sys


def test_a_process_begins_although_its_standard_error_is_closed() -> None:
    program = "from ibex.server.process import begin_process; begin_process('of a test'); print('it began')"
    command = shlex.join([sys.executable, "-c", program])

    done = subprocess.run(["bash", "-c", f"{command} 2>&-"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "it began\n")
