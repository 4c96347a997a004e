"""The page, served on loopback, and the figures that it asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import urlsplit

from omcda_deploy.errors import EndpointError
from omcda_deploy.watch.figures import overview
from omcda_deploy.watch.scrapes import Watched, require_address

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost", "::1")  # by which browsers may call: a foreign page must not read this one
REQUEST_LIMIT_S = 5.0
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class _Site(ThreadingHTTPServer):
    """Answers browsers from what was scraped last."""

    daemon_threads = True

    def __init__(self, port: int, servers: Sequence[Watched]) -> None:
        self.servers = servers
        self.page = files(__package__).joinpath("page.html").read_bytes()
        super().__init__((LOOPBACK, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_LIMIT_S
    server: _Site

    def do_GET(self) -> None:
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in NAMES:
            self._answer(403, "text/plain", b"expected a request to this machine's loopback\n")
        elif self.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/figures":
            self._answer(200, "application/json", json.dumps(overview(self.server.servers)).encode())
        else:
            self._answer(404, "text/plain", b"expected / or /figures\n")

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", POLICY),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Tell nothing of single requests."""


@contextmanager
def watching(endpoints: Sequence[str], port: int, every_s: float) -> Iterator[str]:
    """Scrape ``endpoints`` every ``every_s`` seconds inside the context, and serve the page; yields its URL.

    Raises :class:`EndpointError` for an address that is none, and for a port that cannot be used.
    """
    if not endpoints:
        raise EndpointError("expected at least one metrics port, got none: start servers with --metrics-port")
    for endpoint in endpoints:
        require_address(endpoint)
    servers = [Watched(endpoint) for endpoint in dict.fromkeys(endpoints)]
    try:
        site = _Site(port, servers)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it is no port"
        raise EndpointError(f"cannot listen on {LOOPBACK}:{port}: {reason}. Choose another --port") from error
    stop = threading.Event()
    with ThreadPoolExecutor(len(servers)) as pool:

        def scrape() -> None:
            while True:
                list(pool.map(Watched.scrape, servers))
                if stop.wait(every_s):
                    return

        threads = [threading.Thread(target=work, daemon=True) for work in (scrape, site.serve_forever)]
        for thread in threads:
            thread.start()
        try:
            yield f"http://{LOOPBACK}:{site.server_port}/"
        finally:
            stop.set()
            site.shutdown()
            site.server_close()
            for thread in threads:
                thread.join()
