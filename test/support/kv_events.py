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

from tiered_kv.plugin.upstream.installed import installed

#: Of arrays, after the name of their kind, in the order of SGLang's disaggregation/kv_events.py.
FIELDS = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids"),
        *("block_size", "lora_id", "medium"),
    ),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


class KvEventListener:
    """Block hashes stored and removed, by medium, in the order they were published."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/kv_events"
        self.stored: defaultdict[str, list[int]] = defaultdict(list)
        self.removed: defaultdict[str, list[int]] = defaultdict(list)
        #: Every `BlockStored` by its fields' names.
        self.blocks: list[dict[str, Any]] = []
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "")
        self._socket.connect(self.endpoint)

    @property
    def server_args(self) -> tuple[str, str]:
        config = {"publisher": "zmq", "topic": "kv", "endpoint": self.endpoint}
        if installed() != "0.5.17":  # which has no other format
            config["format"] = "dynamo"
        return ("--kv-events-config", json.dumps(config))

    def collect(self, quiet_s: float = 1.5) -> None:
        """Takes in what has been published, until nothing comes for `quiet_s`."""
        while self._socket.poll(int(quiet_s * 1000)):
            *_, payload = self._socket.recv_multipart()
            _, events, *_ = msgspec.msgpack.decode(payload)
            for event in events:
                self._take(event)

    def _take(self, event: list[Any] | dict[str, Any]) -> None:
        # SGLang 0.5.17 sends arrays that begin with the class's name, later releases maps.
        if isinstance(event, list):
            kind, *values = event
            event = dict(zip(FIELDS[kind], values, strict=False), type=kind)
        hashes, medium = event.get("block_hashes", []), event.get("medium", "")
        if event["type"] == "BlockStored":
            self.stored[medium] += hashes
            self.blocks.append(event)
        elif event["type"] == "BlockRemoved":
            self.removed[medium] += hashes

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
