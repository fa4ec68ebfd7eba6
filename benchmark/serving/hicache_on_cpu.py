"""Start upstream's own HiCache on a machine without a GPU: the baseline that tiering has to beat.

    python benchmark/serving/hicache_on_cpu.py --model-path ... --device cpu \
        --enable-hierarchical-cache --hicache-ratio 2 [--hicache-storage-backend file ...]

SGLang 0.5.17 and 0.5.23 need three things changed for that, all in the scheduler process and none
in this project's product: host pools must not ask for pinned memory (0.5.23 as it is ends there:
"Found no NVIDIA driver on your system", from `_cuda_host_register`), the copy function of
sgl_kernel must exist without CUDA, and the fixed 10 GiB that every host pool leaves free must be
smaller. Its trees, its queues of transfers and its files are as they are. Streams do nothing
on a CPU, so copies between the pools are made at once, by the scheduler's thread.
Takes every flag of `sglang.launch_server`; sets the only I/O backend and layout that can work.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

HOST_RESERVE_BYTES = 1 << 30


def copy_tokens(
    src_layers: list[Any],
    dst_layers: list[Any],
    src_indices: Any,
    dst_indices: Any,
    page_size: int,
) -> None:
    """sgl_kernel's transfer_kv_direct on the CPU: rows by index, one buffer after the other."""
    del page_size
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def patch_host_pools() -> None:
    """To be called before the first host pool is built, in the process that builds it."""
    from sglang.srt.mem_cache import memory_pool_host
    from sglang.srt.mem_cache.pool_host import base, mha, mla

    for module in (base, mha, mla, memory_pool_host):
        if hasattr(module, "HICACHE_HOST_MEMORY_RESERVE_BYTES"):
            module.HICACHE_HOST_MEMORY_RESERVE_BYTES = HOST_RESERVE_BYTES
    for module in (mha, mla):
        module.transfer_kv_direct = copy_tokens
    original = base.HostKVCache.__init__
    signature = inspect.signature(original)

    def init_unpinned(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.arguments["pin_memory"] = False
        original(*given.args, **given.kwargs)

    base.HostKVCache.__init__ = init_unpinned


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process

    patch_host_pools()
    run_scheduler_process(*args, **kwargs)


def main() -> None:
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(__doc__)
        return
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    fixed = ["--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"]
    server_args = prepare_server_args([*sys.argv[1:], *fixed])
    try:
        launch_server(server_args, run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
