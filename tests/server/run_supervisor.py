"""A whole server for tests: `python run_supervisor.py DATA_DIR`; one JSON line on standard output when it is ready."""

import json
import os
import sys

from ibex.config import load_settings
from ibex.server.supervision.status import NodeStatus
from ibex.server.supervision.supervisor import serve

if __name__ == "__main__":
    settings = load_settings({"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": sys.argv[1], "IBEX_PORT": "0"})

    def announce(status: NodeStatus) -> None:
        sys.stdout.write(json.dumps(status.as_dict()) + "\n")
        sys.stdout.flush()

    serve(settings, on_ready=announce)
