"""SGLang's scheduler process with the weights of `launcher.py`.

A module of its own that imports SGLang's scheduler: a child process is given the function by its
name, before its arguments, and which plugins it loads goes by what it has imported by then.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.model_loader import loader

MATRIX_DEVIATION, NORM_DEVIATION = 0.02, 0.1
#: In the environment of a server whose HiCache is to run on a CPU.
HICACHE_ON_CPU = "TIERED_KV_HICACHE_ON_CPU"


def draw_weights(model: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of `initialize_dummy_weights`: the same for the same names."""
    del args, kwargs
    for name, parameter in model.state_dict().items():
        if not torch.is_floating_point(parameter):
            continue
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(name.encode()))
        is_norm = "norm" in name
        mean, deviation = (1.0, NORM_DEVIATION) if is_norm else (0.0, MATRIX_DEVIATION)
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        parameter.data.copy_(drawn.normal_(mean, deviation, generator=generator))


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    loader.initialize_dummy_weights = draw_weights
    if os.environ.get(HICACHE_ON_CPU):
        from benchmark.serving.hicache_on_cpu import patch_host_pools

        patch_host_pools()
    run_scheduler_process(*args, **kwargs)
