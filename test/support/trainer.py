"""What a trainer does to a server: sends it weights, in each of the ways that SGLang has."""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.server import Server, free_port

#: What is changed of a Llama; its first layer, so that everything behind depends on it.
NAME = "model.layers.0.self_attn.q_proj.weight"
GROUP = "trainer"


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    (file,) = model.glob("*.safetensors")
    return dict(load_file(file))


def write_weights(model: Path, weights: dict[str, torch.Tensor]) -> None:
    (file,) = model.glob("*.safetensors")
    save_file(weights, file, metadata={"format": "pt"})


def from_disk(server: Server, model: Path | str, **fields: Any) -> Any:
    body = {"model_path": str(model), **fields}
    return server.post("/update_weights_from_disk", body, timeout_s=60)


@contextmanager
def session(server: Server) -> Iterator[None]:
    """SGLang 0.5.23 takes parts of the weights between two calls; 0.5.17 has none such."""
    has_sessions = server.post("/begin_weight_update", {}, timeout_s=60).status_code != 404
    yield
    if has_sessions:
        answer = server.post("/end_weight_update", {}, timeout_s=60)
        assert answer.status_code == 200, answer.text


def from_tensors(server: Server, tensors: dict[str, torch.Tensor], **fields: Any) -> Any:
    """The bytes of the tensors go with the request: there is no memory to share with a CPU."""
    payload = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    body = {"serialized_named_tensors": [payload], **fields}
    with session(server):
        return server.post("/update_weights_from_tensor", body, timeout_s=60)


def from_ipc(server: Server, **fields: Any) -> Any:
    """There is no checkpoint engine here: it fails."""
    body = {"zmq_handles": {}, **fields}
    return server.post("/update_weights_from_ipc", body, timeout_s=60)


class ProcessGroup:
    """Of two: the trainer, which broadcasts, and the server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        port = free_port()
        joined: list[Any] = []
        body = {
            "master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2,
            "group_name": GROUP, "backend": "gloo",
        }  # fmt: skip
        thread = threading.Thread(
            target=lambda: joined.append(
                server.post("/init_weights_update_group", body, timeout_s=60)
            )
        )
        thread.start()
        # SGLang's `init_custom_process_group`, for a process without SGLang.
        store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True)
        self._group, _ = torch.distributed.distributed_c10d._new_process_group_helper(
            2, 0, [], torch.distributed.Backend("gloo"),
            torch.distributed.PrefixStore(GROUP, store), group_name=GROUP,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        torch.distributed.distributed_c10d._world.pg_group_ranks[self._group] = {0: 0, 1: 1}
        thread.join()
        assert joined[0].status_code == 200, joined[0].text

    def update(self, tensors: dict[str, torch.Tensor], **fields: Any) -> Any:
        answers: list[Any] = []
        body = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "group_name": GROUP,
            **fields,
        }
        thread = threading.Thread(
            target=lambda: answers.append(
                self._server.post("/update_weights_from_distributed", body, timeout_s=60)
            )
        )
        with session(self._server):
            thread.start()
            for tensor in tensors.values():
                torch.distributed.broadcast(tensor, src=0, group=self._group)
            thread.join()
        return answers[0]
