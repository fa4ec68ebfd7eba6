"""A worker for the gateway that computes nothing: it keeps what arrives, and can be killed.

    python stub_worker.py NAME PORT

It answers what the gateway asks of a worker, and a generation with its NAME, as a stream if the
body says `stream`. Two fields of the body are for it alone: `headers_after_s` and `tokens_after_s`,
how long it waits before the answer's head, and before what follows.
"""

from __future__ import annotations

import http.server
import json
import sys
import time
from typing import Any

CACHED = {"device": 1, "host": 0, "disk": 0, "store": 1}
REPORT = {"slo": {"class": "interactive"}, "prompt_tokens": 4, "cached_tokens": CACHED}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""
    received: list[dict[str, Any]]
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answers: dict[str, Any] = {
            "/health": {},
            "/received": self.received,
            "/asked": self.asked,
            "/v1/models": {"data": [{"id": "demo", "object": "model", "owned_by": "sglang"}]},
            "/server_info": {"model_path": "demo", "served_model_name": "demo"},
            "/model_info": {"model_path": "demo", "is_generation": True},
        }
        if path not in ("/received", "/asked"):
            self.asked.append(path)
        self.answer(answers.get(path, {}), 200 if path in answers else 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.received.append({"path": self.path, "headers": headers, "body": body})
        time.sleep(body.get("headers_after_s", 0))
        if body.get("stream"):
            self.stream(body.get("tokens_after_s", 0))
        else:
            time.sleep(body.get("tokens_after_s", 0))
            self.answer(self.generated("message"))

    def generated(self, part: str) -> dict[str, Any]:
        choice = {"index": 0, part: {"role": "assistant", "content": self.name}}
        if self.path == "/v1/completions":
            choice = {"index": 0, "text": self.name}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "demo",
            "choices": [choice],
            "text": self.name,
            "metadata": {"tiered_kv": [REPORT]},
        }

    def stream(self, wait_s: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(json.dumps(self.generated("delta")))
        time.sleep(wait_s)
        self.chunk("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.flush()

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Listener(http.server.ThreadingHTTPServer):
    request_queue_size = 256


if __name__ == "__main__":
    Handler.name, Handler.received, Handler.asked = sys.argv[1], [], []
    Listener(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
