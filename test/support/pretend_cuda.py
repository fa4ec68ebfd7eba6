"""Imports what a server with these flags imports on an H200, and prints what its flags come to.

    python pretend_cuda.py FLAGS...

torch is made to say that there is such a GPU: nothing is run on it, and nothing could be.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.tokenizer_manager",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner",
    "sglang.srt.layers.attention.flashinfer_backend",
    "sglang.srt.models.llama",
    "tiered_kv.plugin.attention.flashinfer",
    "tiered_kv.plugin.cache.build",
)
MIB = 1 << 20
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, total_memory=143771 * MIB, multi_processor_count=132,
    warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, L2_cache_size=60 * MIB, is_integrated=False,
    gcnArchName="",
)  # fmt: skip


def pretend() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: (PROPERTIES.major, PROPERTIES.minor)
    cuda.get_device_name = lambda *_: PROPERTIES.name
    cuda.get_device_properties = lambda *_: PROPERTIES
    cuda.mem_get_info = lambda *_: (143000 * MIB, PROPERTIES.total_memory)
    for name in ("_lazy_init", "set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_: None)


def main() -> None:
    pretend()
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    server_args = prepare_server_args(sys.argv[1:])
    for module in MODULES:
        importlib.import_module(module)
    # Looks for the versions of packages that it relies on.
    engine = importlib.import_module("sglang.srt.entrypoints.engine")
    engine._set_envs_and_config(server_args)
    graphs = server_args.cuda_graph_config
    found = {
        "device": server_args.device,
        "attention_backend": server_args.attention_backend,
        "decode_sizes": graphs.decode.bs,
        "prefill": graphs.prefill.backend,
        "prefill_sizes": graphs.prefill.bs,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
