"""Speculative decoding on a CPU, without the compiled kernels of SGLang's CPU engine.

SGLang has a branch for its own CPU engine wherever a draft is made, verified or given slots; the
kernels for it are in a build of `sgl_kernel` that no plain torch has. Here these branches are
taken, with `draft_kernels.py` in the place of the kernels. Sampling is among what they do not have:
an answer that is speculated on is greedy there, whatever its temperature.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tiered_kv.plugin.upstream import draft_kernels
from tiered_kv.plugin.upstream.current import hardware


def register() -> None:
    """Have a worker that speculates find what it needs, in the process that runs the model."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    create: Callable[..., Any] = SpeculativeAlgorithm.create_worker
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_worker(algorithm: Any, server_args: Any) -> Any:
        with _kernels_importable():
            worker = create(algorithm, server_args)
            install()
        return worker

    SpeculativeAlgorithm.create_worker = create_worker


def install() -> None:
    """Put our kernels into the modules of SGLang's that call them."""
    # Of moved KV, which is moved in plain torch.
    os.environ.setdefault("SGLANG_NATIVE_MOVE_KV_CACHE", "1")
    for name, kernels in hardware.DRAFT_KERNELS.items():
        module = importlib.import_module(name)
        for place, kernel in kernels.items():
            setattr(module, place, getattr(draft_kernels, kernel))
        vars(module)["_is_cpu"] = True
    _do_without_compiler()
    hardware.prepare_speculation()


def _do_without_compiler() -> None:
    """What chooses among drafts takes microseconds on a CPU, and a minute to compile."""
    from sglang.srt.speculative import spec_utils

    for name in ("_select_top_k_tokens_first", "_select_top_k_tokens_later"):
        compiled = getattr(spec_utils, name)
        setattr(spec_utils, name, getattr(compiled, "_torchdynamo_orig_callable", compiled))


@contextmanager
def _kernels_importable() -> Iterator[None]:
    """A module names a kernel as it is loaded, whatever the device."""
    package, speculative = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.speculative")
    package.__path__ = []
    kernel = draft_kernels.reconstruct_indices_from_tree_mask
    vars(speculative)[kernel.__name__] = kernel
    stand_ins = {module.__name__: module for module in (package, speculative)}
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)
