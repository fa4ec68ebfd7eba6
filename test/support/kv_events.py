"""Listens to the KV cache events that a server publishes over ZMQ."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import zmq


class KvEventListener:
    """Block hashes stored and removed, by medium, in the order they were published."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/kv_events"
        self.stored: defaultdict[str, list[int]] = defaultdict(list)
        self.removed: defaultdict[str, list[int]] = defaultdict(list)
        #: (parent's hash, tokens, medium) of what was stored: all that many routers go by.
        self.parents: list[tuple[int | None, tuple[int, ...], str]] = []
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "")
        self._socket.connect(self.endpoint)

    @property
    def server_args(self) -> tuple[str, str]:
        config = {"publisher": "zmq", "topic": "kv", "endpoint": self.endpoint}
        return ("--kv-events-config", json.dumps(config))

    def collect(self, quiet_s: float = 1.5) -> None:
        """Takes in what has been published, until nothing comes for `quiet_s`."""
        while self._socket.poll(int(quiet_s * 1000)):
            *_, payload = self._socket.recv_multipart()
            _, events, *_ = msgspec.msgpack.decode(payload)
            for event in events:
                self._take(event)

    def _take(self, event: list[Any]) -> None:
        # Arrays tagged with the class name, fields in the order of SGLang's disaggregation/
        # kv_events.py: BlockStored(hashes, parent, tokens, block size, LoRA id, medium).
        kind, *fields = event
        if kind == "BlockStored":
            self.stored[fields[5]] += fields[0]
            self.parents.append((fields[1], tuple(fields[2]), fields[5]))
        elif kind == "BlockRemoved":
            self.removed[fields[1]] += fields[0]

    def wait_for(self, medium: str, n_stored: int, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.stored[medium]) < n_stored and time.monotonic() < deadline:
            self.collect(quiet_s=0.2)

    def __enter__(self) -> KvEventListener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close(linger=0)
