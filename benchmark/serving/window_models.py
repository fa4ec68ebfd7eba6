"""What layers with a window cost below the device: bytes that are kept and moved, TTFT by tier.

    python -m benchmark.serving.window_models --model MODEL

Three servers of a random model in the shape of Gemma 3 (five layers of six look back --window
tokens): plain SGLang; --tiered-kv with all layers alike, as it keeps them when decodes may be
parked; and --tiered-kv with windows apart. Each computes --prompts prompts, then gets them from the
host, which has all, while the device has two, and then, after the cache was emptied, from the disk.
All servers are up at once, one works at a time, in turns. Times are those of answers of one token.
MODEL gives the tokenizer. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from harness.client import Answer, generate
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, BASE_ARGS, FLOAT32, Server
from harness.servers import servers_up
from tiered_kv.metrics import names

PAGE = 64
CHUNK = 512
LAYERS, PATTERN = 12, 6
SYSTEMS = {
    "plain": "plain SGLang: computes",
    "alike": "--tiered-kv, all layers kept alike (--tiered-kv-iteration-policy slack)",
    "apart": "--tiered-kv, windows apart",
}
PLACES = ("computed", "host", "disk")


def make_model(tokenizer: Path, to: Path, window: int) -> Path:
    """Random weights in the shape of Gemma 3."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shutil.copytree(tokenizer, to, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    theirs = json.loads((tokenizer / "config.json").read_text())
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=window,
        sliding_window_pattern=PATTERN,
        vocab_size=theirs["vocab_size"],
        max_position_embeddings=8192,
        initializer_range=0.05,
        bos_token_id=theirs["bos_token_id"],
        eos_token_id=theirs["eos_token_id"],
        dtype="float32",
    )
    Gemma3ForCausalLM(config).save_pretrained(to)
    return to


def make_servers(options: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Server]:
    pool = 2 * (options.tokens + PAGE)
    common = [
        *(*BASE_ARGS, *FLOAT32, "--page-size", PAGE, "--chunked-prefill-size", CHUNK),
        *("--max-total-tokens", pool, "--enable-metrics", "--sleep-on-idle"),
    ]
    # What SGLang compiles of Gemma takes minutes on two cores, and computes the same.
    env = {"TORCHDYNAMO_DISABLE": "1"}
    only_platform = {**env, "SGLANG_PLUGINS": "tiered_kv_cpu"}
    servers = {"plain": Server(map(str, common), scratch / "plain.log", model, env=only_platform)}
    policies = {"alike": "slack", "apart": "all"}
    for name, policy in policies.items():
        tiered = [
            *("--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", "400MB"),
            *("--tiered-kv-disk-dir", scratch / name, "--tiered-kv-disk-size", "2GB"),
            *("--tiered-kv-iteration-policy", policy),
        ]
        flags = map(str, [*common, *tiered])
        servers[name] = Server(flags, scratch / f"{name}.log", model, env=env)
    return servers


def moved(server: Server) -> dict[str, float]:
    """Bytes so far."""
    now = scrape(server)
    return {
        "to_host": now.of(names.TRANSFER_BYTES, source="device", target="host"),
        "to_device": now.of(names.TRANSFER_BYTES, source="host", target="device"),
    }


class Run:
    """What each system answers, and when, and what it moves meanwhile."""

    def __init__(self, up: Mapping[str, Server], prompts: list[tuple[int, ...]], bar: Any) -> None:
        self._up, self._prompts, self._bar = up, prompts, bar
        self.rows: list[dict[str, Any]] = []
        self._said: dict[str, list[tuple[int, ...]]] = {}

    def ask(self, place: str) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in self._up}
        answers: dict[str, list[Answer]] = {name: [] for name in self._up}
        before = {name: moved(server) for name, server in self._up.items()}
        for prompt in self._prompts:
            for name, server in self._up.items():
                started = time.perf_counter()
                answers[name].append(generate(server, prompt, 1))
                seconds[name].append(time.perf_counter() - started)
                self._bar.update()
        for name, server in self._up.items():
            if name != "plain":
                wait_for_disk(server)
            self._add(place, name, answers[name], seconds, before[name], moved(server))

    def _add(
        self,
        place: str,
        name: str,
        answers: list[Answer],
        seconds: Mapping[str, list[float]],
        before: Mapping[str, float],
        after: Mapping[str, float],
    ) -> None:
        n_tokens = sum(len(prompt) for prompt in self._prompts)
        said = [answer.output_ids for answer in answers]
        truth = self._said.setdefault("plain", said)
        self.rows.append(
            {
                "place": place,
                "system": name,
                "ttft_p50_s": statistics.median(seconds[name]),
                "plain_by_it": statistics.median(
                    a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)
                ),
                "found_tokens": {
                    tier: sum(getattr(one, tier) for one in answers)
                    for tier in ("device", "host", "disk")
                },
                **{
                    f"{way}_bytes_per_token": (after[way] - before[way]) / n_tokens for way in after
                },
                "equal": sum(a == b for a, b in zip(said, truth, strict=True)),
            }
        )


def table(rows: list[dict[str, Any]], n: int) -> str:
    head = (
        "| asked | system | TTFT p50, s | plain / it | KiB per token to the host | to the device "
    )
    lines = [head + "| found: host | disk | same answer |", "|---|---|" + "---:|" * 7]
    for r in rows:
        found = r["found_tokens"]
        kib = [r[f"{way}_bytes_per_token"] / 1024 for way in ("to_host", "to_device")]
        lines.append(
            f"| {r['place']} | {r['system']} | {r['ttft_p50_s']:.3f} | {r['plain_by_it']:.2f}x "
            f"| {kib[0]:.2f} | {kib[1]:.2f} | {found['host']:,} | {found['disk']:,} "
            f"| {r['equal']} of {n} |"
        )
    return "\n".join(lines)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    n_full = LAYERS // PATTERN
    layer_kib = 2 * 4 * 64 * 4 // 1024
    what = "\n".join(f"- {name}: {text}" for name, text in SYSTEMS.items())
    text = f"""# Layers with a window, below the device

SGLang {version("sglang")}; {machine}; a random model of {LAYERS} layers, of which all but {n_full}
look back {options.window} tokens; {options.prompts} prompts of {options.tokens:,} tokens in chunks
of {CHUNK}; float32: {LAYERS * layer_kib} KiB of KV per token in all layers,
{n_full * layer_kib} KiB in those without a window. *plain / it*: the median of the same prompt's
times. {options.note}

{what}

{table(rows, options.prompts)}

    python -m benchmark.serving.window_models --model MODEL
"""
    document = {"sglang": version("sglang"), "machine": machine, "rows": rows}
    options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(text)
    return text


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.window_models", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model, for its tokenizer")
    add("--prompts", type=int, default=6, help="how many (default: 6)")
    add("--tokens", type=int, default=2048, help="of each (default: 2048)")
    add("--window", type=int, default=256, help="in tokens (default: 256)")
    add("--note", default="", help="a sentence on the machine, for the report")
    add("--out", type=Path, default=RESULTS / "window_models", metavar="NAME")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    maker = PromptMaker(options.model)
    prompts = [maker.tokens(f"windows {i}", options.tokens) for i in range(options.prompts)]
    with tempfile.TemporaryDirectory(prefix="tiered_kv_bench_") as folder:
        scratch = Path(folder)
        model = make_model(options.model, scratch / "model", options.window)
        with (
            servers_up(make_servers(options, model, scratch)) as up,
            tqdm(total=len(PLACES) * len(prompts) * len(up), desc="requests", unit="req") as bar,
        ):
            run = Run(up, prompts, bar)
            for place in PLACES:
                if place == "disk":
                    for server in up.values():
                        server.flush_cache()
                run.ask(place)
        print(write(options, run.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
