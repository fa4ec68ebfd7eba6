"""The tests' and benchmarks' own clients reach servers on this machine, whatever proxy is named."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
import httpx, requests
from harness.server import Server
url = sys.argv[1]
print(requests.get(url, timeout=5).status_code, httpx.get(url, timeout=5).status_code)
"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_no_proxy_is_asked_for_a_server_of_the_tests() -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, f"http://127.0.0.1:{server.server_port}"],
            env={**environment, **proxies, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        server.shutdown()
    assert result.stdout.strip() == "204 204", result.stderr
