"""Whether the server in this container lives: asks its /health over the real socket; exit code 1 is no."""  # noqa: INP001

import http.client
import sys

SECONDS = 2.0


def main(port: str) -> int:
    """Ask once. No proxy is asked, whatever HTTP_PROXY says."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        return int(connection.getresponse().status != 200)
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"no answer: {error}\n")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
