"""Compiles kernels for a GPU that need not be here; `jit.py` runs it where SGLang is installed.

    python jit_child.py FOLDER ARCH

FlashInfer's modules go to FOLDER/flashinfer/NAME/NAME.so, where its `flashinfer_jit_cache` package
would have them, SGLang's own to FOLDER/tvm_ffi. What is there is not built again. The shapes are
those of Llama-3.1-8B and others with heads of 128: bf16, 8 KV heads, hidden size 4096.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD_DIM = 128
HIDDEN_SIZE = 4096
#: Bytes of K (and of V) of one token and layer.
ROW_BYTES = 8 * HEAD_DIM * 2


def say(name: str, start: float, what: str) -> None:
    sys.stderr.write(f"[jit] {name}: {what}, {time.monotonic() - start:.0f} s\n")
    sys.stderr.flush()


def flashinfer_specs() -> list[tuple[str, Callable[[], Any]]]:
    """What upstream's flashinfer backend and cascade attention use, what gpu_check needs first.

    Its model has four query heads to a KV head: these decode by the kernels of prefill, and those
    of decode are for models with fewer. Not sampling, the slowest to build: a bundle samples in
    PyTorch (`cli.SERVE_FLAGS`).
    """
    import torch
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.page import gen_page_module

    types = {"dtype_q": torch.bfloat16, "dtype_kv": torch.bfloat16, "dtype_o": torch.bfloat16}
    shape = {
        **types,
        "dtype_idx": torch.int32,
        "head_dim_qk": HEAD_DIM,
        "head_dim_vo": HEAD_DIM,
        "pos_encoding_mode": 0,
        "use_sliding_window": False,
        "use_logits_soft_cap": False,
    }
    return [
        ("cascade", gen_cascade_module),
        ("page", gen_page_module),
        (
            "batch prefill, fa2",
            lambda: gen_batch_prefill_module(backend="fa2", use_fp16_qk_reduction=False, **shape),
        ),
        ("batch decode", lambda: gen_batch_decode_module(**shape)),
    ]


def build_flashinfer(folder: Path) -> None:
    for name, make_spec in flashinfer_specs():
        start = time.monotonic()
        spec = make_spec()
        target = folder / spec.name / f"{spec.name}.so"
        if target.exists():
            say(name, start, "there already")
            continue
        spec.build(verbose=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copyfile(spec.jit_library_path, partial)
        partial.replace(target)
        say(name, start, f"{target.stat().st_size >> 10} KiB")


def sglang_modules() -> list[tuple[str, Callable[[], Any]]]:
    import torch
    from sglang.kernels.ops.activation import activation
    from sglang.kernels.ops.attention import clamp_position, rope
    from sglang.kernels.ops.kvcache import hicache, kvcache
    from sglang.kernels.ops.layernorm import norm

    bf16 = torch.bfloat16
    rows = {"element_size": ROW_BYTES, "unroll": 1, "block_quota": hicache.DEFAULT_BLOCK_QUOTA}
    return [
        ("kvcache", lambda: kvcache._jit_kvcache_module(ROW_BYTES, ROW_BYTES)),
        ("hicache", lambda: hicache._jit_hicache_module(**rows)),
        ("hicache staged", lambda: hicache._jit_hicache_staged_module(**rows)),
        ("activation", lambda: activation.activation_module(bf16)),
        ("rope", lambda: rope._jit_fused_rope_module(True, HEAD_DIM, bf16, bf16)),
        ("rmsnorm", lambda: norm._jit_rmsnorm_module(HIDDEN_SIZE, bf16)),
        ("fused add rmsnorm", lambda: norm._jit_fused_add_rmsnorm_module(bf16, False)),
        ("clamp position", lambda: clamp_position._jit_clamp_position_module(torch.int64)),
    ]


def build_sglang(folder: Path, major: int, minor: int) -> list[str]:
    """The modules that could not be built."""
    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch

    failed = []
    with override_jit_cuda_arch(major, minor):
        for name, load in sglang_modules():
            start, before = time.monotonic(), set(folder.rglob("*.so"))
            error = ""
            try:
                load()
            except Exception as raised:  # built, but without a driver it may not load here
                error = str(raised).strip().splitlines()[-1] if str(raised) else repr(raised)
            new = set(folder.rglob("*.so")) - before
            if new or not error:
                say(name, start, "built" if new else "there already")
            else:
                failed.append(name)
                say(name, start, f"not built ({error})")
    return failed


def main() -> int:
    folder, arch = Path(sys.argv[1]), sys.argv[2]
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
    os.environ["TVM_FFI_CACHE_DIR"] = str(folder / "tvm_ffi")
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(folder / "work")
    major, minor = (int(part.rstrip("af")) for part in arch.split("."))
    (folder / "tvm_ffi").mkdir(parents=True, exist_ok=True)
    failed = build_sglang(folder / "tvm_ffi", major, minor)
    build_flashinfer(folder / "flashinfer")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
