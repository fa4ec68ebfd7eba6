"""Starts SGLang with random weights that a model could have: an answer depends on what it reads.

    python benchmark/gpu/launcher.py --model-path FOLDER --load-format dummy ...

SGLang's dummy weights lie within a thousandth of zero. Attention is then an average, whatever the
keys, and what it adds to a token is lost in rounding: a server with wrong KV would give the same
answers. Here matrices are drawn with the deviation that models are begun with, norms are about
one, and what is drawn depends on the parameter's name alone: all servers have the same model.
Takes every flag of `sglang.launch_server`. Where HiCache is to run on a CPU, it gets what
benchmark/serving/hicache_on_cpu.py gives it.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(Path(__file__).parents[2]))

MATRIX_DEVIATION, NORM_DEVIATION = 0.02, 0.1


def draw_weights(model: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of `initialize_dummy_weights`: the same for the same names."""
    import torch

    del args, kwargs
    for name, parameter in model.state_dict().items():
        if not torch.is_floating_point(parameter):
            continue
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(name.encode()))
        is_norm = "norm" in name
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        drawn.normal_(1.0 if is_norm else 0.0, NORM_DEVIATION if is_norm else MATRIX_DEVIATION,
                      generator=generator)  # fmt: skip
        parameter.data.copy_(drawn)


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.model_loader import loader

    loader.initialize_dummy_weights = draw_weights
    if os.environ.get("TIERED_KV_HICACHE_ON_CPU"):
        from benchmark.serving.hicache_on_cpu import patch_host_pools

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

    flags = sys.argv[1:]
    on_cpu = "cpu" in flags[flags.index("--device") + 1 :][:1] if "--device" in flags else False
    if on_cpu and "--enable-hierarchical-cache" in flags:
        os.environ["TIERED_KV_HICACHE_ON_CPU"] = "1"
    load_plugins()
    server_args = prepare_server_args(flags)
    try:
        launch_server(server_args, run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
