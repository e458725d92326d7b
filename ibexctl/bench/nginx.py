"""nginx as a plain proxy before the same provider: one process, no checks, no record; the floor of any proxy."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ibexctl.bench.callers import Target

_START_SECONDS = 5.0

_CONFIGURATION = """\
daemon off;
master_process off;
worker_processes 1;
pid {root}/nginx.pid;
error_log stderr error;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 300s;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    upstream provider {{ server {upstream}; keepalive 4096; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {scheme}://provider;{tls}
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


_TLS = """
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_ssl_trusted_certificate {authority};"""


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running one."""

    port: int
    pid: int


def find_nginx() -> str | None:
    """The program, when it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def serve_nginx(program: str, upstream: Target) -> Iterator[Nginx | None]:
    """nginx before `upstream` until the block ends; None when it does not start."""
    with TemporaryDirectory(prefix="ibex-nginx-") as directory:
        port = free_port()
        path = Path(directory) / "nginx.conf"
        scheme, tls = ("https", _TLS.format(authority=upstream.authority_file)) if upstream.is_tls else ("http", "")
        text = _CONFIGURATION.format(root=directory, upstream=upstream.authority, port=port, scheme=scheme, tls=tls)
        path.write_text(text)
        process = subprocess.Popen(  # noqa: S603 - found on the PATH
            [program, "-p", directory, "-e", "stderr", "-c", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Nginx(port, process.pid) if is_listening(process, port) else None
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_listening(process: "subprocess.Popen[bytes]", port: int, *, within: float = _START_SECONDS) -> bool:
    """Wait until somebody listens on a port of loopback; whether that was before the process ended or time was up."""
    deadline = time.monotonic() + within
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.02)
    return False
