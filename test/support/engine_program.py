"""A user's program around `sgl.Engine`: once as stock SGLang has it, once with the tiers.

Run as a program: JSON {"prompts": [[ids]], "max_new_tokens": n, "stock": {...}, "tiered": {...}} on
its standard input, the two sets of keyword arguments for the engine; writes its findings as JSON
to the file named by its argument.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

FLUSH_TIMEOUT_S = 60.0


def answers(engine: Any, prompts: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return [
        engine.generate(input_ids=prompt, sampling_params=sampling, return_logprob=False)
        for prompt in prompts
    ]


def flushed(engine: Any) -> bool:
    """Whether the cache is empty now; while pages are on their way to the disk it can't be."""
    give_up_s = time.monotonic() + FLUSH_TIMEOUT_S
    while not engine.flush_cache().success:
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.2)
    return True


def main() -> None:
    import sglang as sgl

    asked = json.load(sys.stdin)
    prompts, max_new_tokens = asked["prompts"], asked["max_new_tokens"]
    found: dict[str, Any] = {}

    stock = sgl.Engine(**asked["stock"])
    found["stock"] = answers(stock, prompts, max_new_tokens)
    stock.shutdown()
    found["loaded_without_flag"] = sorted(n for n in sys.modules if n.startswith("tiered_kv."))

    tiered = sgl.Engine(**asked["tiered"])
    # Twice: the second round finds the first prompts pushed out of the device.
    found["tiered"] = answers(tiered, prompts, max_new_tokens)
    found["again"] = answers(tiered, prompts, max_new_tokens)
    found["flushed"] = flushed(tiered)
    found["after_flush"] = answers(tiered, prompts, max_new_tokens)
    tiered.shutdown()

    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
