"""Lets stock SGLang serve on any CPU, as an out-of-tree platform.

Upstream's own CPU engine needs a CPU build of its kernels. This platform needs none: layers run
their native torch forward, attention is `torch_native`. It steps aside wherever something faster
is there. Upstream asks `activate()` (through `tiered_kv_entry_points`) in every process,
whether or not `--tiered-kv` is given; what it asks of the class is in
`sglang/srt/platforms/interface.py`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from tiered_kv.plugin.upstream.current import hardware

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Packages that bring an accelerator which a plain torch does not know of.
_ACCELERATOR_PACKAGES = ("torch_npu", "habana_frameworks", "torch_musa", "torchada")
# Upstream sizes the KV pool to nearly all free memory, right for a GPU that nobody else uses.
# A machine's RAM is shared, and upstream writes to the whole pool at start. This caps it only
# where neither --max-total-tokens nor --mem-fraction-static is given.
_DEFAULT_MAX_TOTAL_TOKENS = 65_536
# What torch calls the units that multiply in these types. On a CPU without them products take
# several times as long as in float32: the demo model's prefill 3 times with AVX-512 and 6 with AVX2
# (bfloat16), single products 12 times (float16).
_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
#: What 0.5.23 asks about before it speculates, by the names that it has then.
SPECULATES = ("EAGLE", "EAGLE3", "STANDALONE")
#: Architectures that SGLang refuses to serve with `torch_native`, whose attention ours can all the
#: same: it has the name `triton`, too.
_ASK_FOR_TRITON = (
    "GptOssForCausalLM",
    "Exaone4ForCausalLM",
    "ExaoneMoEForCausalLM",
    "ExaoneMoeForCausalLM",
)
_ACCELERATOR_BACKENDS = ("cuda", "xpu", "mps", "npu", "hpu", "musa")


def activate() -> str | None:
    """The platform's class name if this machine has only a CPU and a CPU is wanted, else None.

    `SGLANG_USE_CPU_ENGINE=1` asks for upstream's own CPU engine, so it means None too.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    if requested_device(sys.argv[1:]) not in (None, "cpu"):
        return None
    if has_accelerator():
        return None
    return f"{TieredKVCpuPlatform.__module__}.{TieredKVCpuPlatform.__qualname__}"


def requested_device(argv: Sequence[str]) -> str | None:
    """The device type that `--device` names (`cpu:0` -> `cpu`), None without the flag."""
    device = None
    for position, argument in enumerate(argv):
        if argument == "--device" and position + 1 < len(argv):
            device = argv[position + 1]
        elif argument.startswith("--device="):
            device = argument.removeprefix("--device=")
    return None if device is None else device.split(":")[0]


def has_accelerator() -> bool:
    """Whether torch, or an add-on that is installed, can reach anything but the CPU."""
    for name in _ACCELERATOR_BACKENDS:
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return True
    return any(importlib.util.find_spec(name) is not None for name in _ACCELERATOR_PACKAGES)


def cores_by_rank(n_ranks: int) -> str:
    """This process's cores in equal shares, as SGLANG_CPU_OMP_THREADS_BIND takes them ("0,1|2,3").

    Upstream has ranks share a core only if they are told to, so with fewer cores than ranks they
    take turns.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // n_ranks)
    shares = [
        [cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(n_ranks)
    ]
    return "|".join(",".join(map(str, own)) for own in shares)


def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU computes in `dtype` itself."""
    return dtype not in _UNITS or any(
        torch.cpu.get_capabilities().get(unit, False) for unit in _UNITS[dtype]
    )


def choose_dtype(server_args: ServerArgs) -> None:
    """Make `--dtype auto`, the default, float32 where SGLang's choice would be slow here.

    SGLang takes bfloat16 for bfloat16 models, and float16 for all others.
    """
    from tiered_kv.plugin.upstream.current import arguments

    if server_args.dtype != "auto" or all(map(has_units, _UNITS)):
        return
    model = arguments.model_config(server_args)
    # Quantised weights have layers of their own, which take one type.
    if model.quantization is not None or has_units(model.dtype):
        return
    logger.warning(
        "This CPU has no units for %s, so the model runs in float32, which is faster here but "
        "takes twice the memory; --dtype decides otherwise.",
        str(model.dtype).removeprefix("torch."),
    )
    server_args.dtype = "float32"
    model.dtype = torch.float32  # upstream keeps this object


def architectures(server_args: ServerArgs) -> list[str]:
    """What the model's configuration says it is."""
    from tiered_kv.plugin.upstream.current import arguments

    return arguments.model_config(server_args).hf_config.architectures or []


def choose_experts(server_args: ServerArgs) -> None:
    """Have GPT-OSS's experts laid out as torch multiplies them.

    SGLang chooses a kernel for GPUs that takes them transposed, if that can be imported, whatever
    the device.
    """
    if server_args.moe_runner_backend == "auto" and "GptOssForCausalLM" in architectures(
        server_args
    ):
        server_args.moe_runner_backend = "triton"


class TieredKVCpuPlatform(hardware.PlainPlatform, CpuDeviceMixin, SRTPlatform):
    """A CPU on which every layer runs its native torch forward."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Defaults that upstream would take from its CPU kernels or from a GPU's memory."""
        if server_args.attention_backend == "intel_amx":
            asks = not set(_ASK_FOR_TRITON).isdisjoint(architectures(server_args))
            server_args.attention_backend = (
                "triton" if asks else self.get_default_attention_backend()
            )
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = _DEFAULT_MAX_TOTAL_TOKENS
        if server_args.grammar_backend is None:
            # Upstream's default, xgrammar, allocates pinned memory, which needs a GPU.
            server_args.grammar_backend = "llguidance"
        # Upstream has transformers' fast processors of images compute on a GPU.
        server_args.disable_fast_image_processor = True
        # Attention in torch reads one pool by one table of slots; of a second, for layers with a
        # window, it would read the wrong ones.
        server_args.disable_hybrid_swa_memory = True
        choose_dtype(server_args)
        choose_experts(server_args)
        # A prefill server waits with a CUDA event for what it sends ahead of a pass.
        os.environ.setdefault("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "0")
        n_shares = hardware.core_shares(server_args)
        if n_shares > 1 or server_args.pp_size > 1:
            # Ranks talk over gloo. Upstream takes the NCCL library that comes with torch for a
            # sign of GPUs and opens it on this device; one that cannot be loaded is left alone.
            os.environ.setdefault("SGLANG_NCCL_SO_PATH", "no NCCL on a CPU")
        if n_shares > 1:
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_by_rank(n_shares))

    def get_device(self, device_id: int = 0) -> str:
        """A string, because `ServerArgs` takes `--device` from here when it isn't given."""
        return self.device_type

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in SPECULATES

    def init_backend(self) -> None:
        """Upstream calls it once in each process that runs the model, before it builds one."""
        from tiered_kv.plugin.attention import cpu as cpu_attention
        from tiered_kv.plugin.attention import draft_steps
        from tiered_kv.plugin.upstream import (
            cpu_dp_attention,
            cpu_heads,
            cpu_kernels,
            cpu_speculation,
        )

        cpu_attention.register()
        draft_steps.register()
        cpu_dp_attention.register()
        cpu_kernels.register()
        cpu_heads.register()
        cpu_speculation.register()
