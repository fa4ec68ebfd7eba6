"""As much of a Kubernetes API as a gateway asks: pods, listed and watched."""

from __future__ import annotations

import http.server
import json
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

LABELS = {"app.kubernetes.io/name": "tiered-kv", "app.kubernetes.io/component": "worker"}


class StubKubernetes:
    """`with StubKubernetes(folder) as cluster:` answers at the address in `cluster.kubeconfig`."""

    def __init__(self, folder: Path, namespace: str = "tiered-kv") -> None:
        self.kubeconfig, self._namespace = folder / "kubeconfig", namespace
        self._pods: dict[str, dict[str, Any]] = {}
        self._watches: list[queue.Queue[dict[str, Any]]] = []
        self._version = 1
        self._lock = threading.Lock()
        self.paths: list[str] = []
        cluster = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                cluster.paths.append(self.path)
                if "watch=true" in self.path:
                    self.watch()
                    return
                data = json.dumps(cluster._list()).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def watch(self) -> None:
                events: queue.Queue[dict[str, Any]] = queue.Queue()
                cluster._watches.append(events)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while True:
                    line = json.dumps(events.get()).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                    self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> StubKubernetes:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self._server.server_port}"
        context = {"cluster": "stub", "user": "stub", "namespace": self._namespace}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stub", "cluster": {"server": address}}],
            "users": [{"name": "stub", "user": {}}],
            "contexts": [{"name": "stub", "context": context}],
            "current-context": "stub",
        }
        self.kubeconfig.write_text(yaml.safe_dump(document))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()

    def _list(self) -> dict[str, Any]:
        metadata = {"resourceVersion": str(self._version)}
        items = list(self._pods.values())
        return {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items}

    def put(self, name: str, *, is_ready: bool, is_leaving: bool = False) -> None:
        """The pod is there, at 127.0.0.1; `is_leaving` is what `kubectl delete` makes of it."""
        with self._lock:
            self._version += 1
            kind = "MODIFIED" if name in self._pods else "ADDED"
            self._pods[name] = self._pod(name, is_ready=is_ready, is_leaving=is_leaving)
            self._tell(kind, name)

    def delete(self, name: str) -> None:
        with self._lock:
            self._version += 1
            self._tell("DELETED", name)
            del self._pods[name]

    def _tell(self, kind: str, name: str) -> None:
        for events in self._watches:
            events.put({"type": kind, "object": self._pods[name]})

    def _pod(self, name: str, *, is_ready: bool, is_leaving: bool) -> dict[str, Any]:
        metadata = {
            "name": name,
            "namespace": self._namespace,
            "uid": f"uid-{name}",
            "resourceVersion": str(self._version),
            "labels": LABELS,
            **({"deletionTimestamp": "2026-11-30T00:00:00Z"} if is_leaving else {}),
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"containers": [{"name": "worker", "image": "worker"}]},
            "status": {
                "phase": "Running",
                "podIP": "127.0.0.1",
                "conditions": [{"type": "Ready", "status": str(is_ready)}],
            },
        }
