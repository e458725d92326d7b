"""Write the dashboards from their descriptions in this directory; `--check` only names those that are stale."""

import json
import sys
from pathlib import Path

from providers import PROVIDERS  # the modules beside this one
from proxy import PROXY
from stores import STORES
from tenants import TENANTS

HERE = Path(__file__).resolve().parent
DASHBOARDS = (PROXY, PROVIDERS, TENANTS, STORES)


def main(arguments: list[str]) -> int:
    """Write or check every dashboard; the exit status."""
    wanted = {
        HERE / "dashboards" / f"{dashboard.uid}.json": json.dumps(dashboard.to_json(), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is stale: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote infra/grafana/dashboards/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
