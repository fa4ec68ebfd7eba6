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
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> None:
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(__doc__)
        return
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from benchmark.gpu.scheduler_process import HICACHE_ON_CPU, run_scheduler

    load_plugins()
    server_args = prepare_server_args(sys.argv[1:])
    is_hicache = server_args.enable_hierarchical_cache and not server_args.tiered_kv
    if server_args.device == "cpu" and is_hicache:
        os.environ[HICACHE_ON_CPU] = "1"
    try:
        launch_server(server_args, run_scheduler_process_func=run_scheduler)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
