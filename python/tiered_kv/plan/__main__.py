"""The command `python -m tiered_kv.plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiered_kv.core.device_spec import DEVICES, DeviceSpec, find_device
from tiered_kv.core.errors import ConfigError, TieredKVError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import MODELS, ModelSpec
from tiered_kv.core.units import parse_bytes
from tiered_kv.plan import report
from tiered_kv.plan.capacity import context_memory, nominal_parameters, tier_capacities
from tiered_kv.plan.costs import decode_split, doubling, hit_cost, long_context_costs
from tiered_kv.plan.models import Loaded, Overrides, load_model, with_draft
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost

_TABLE = "Llama-3.1-8B@128000,Qwen-7B@16000,Gemma-7B@8192,Qwen-14B@16000"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.plan",
        description="Plans a tiered KV cache: what fits in which tier, what a hit there saves "
        "against computing the prefix, from which length on it does, and what long context costs. "
        "Times are predictions of a roofline (see docs/planning.md), not measurements.",
        epilog="Examples: --model Llama-3.1-8B --device H100-80 --host 512GB --disk 4TB; "
        "--model path/to/config.json --device 4xH200-141; --table",
    )
    what = parser.add_argument_group("what to plan")
    what.add_argument(
        "--model", default="Llama-3.1-8B",
        help=f"a preset ({', '.join(MODELS)}) or the path of a Hugging Face config.json or of the "
        "directory that holds it (default Llama-3.1-8B)",
    )  # fmt: skip
    what.add_argument(
        "--draft", metavar="MODEL",
        help="a model or head that drafts for it and has KV (EAGLE, NEXTN, STANDALONE), named the "
        "same way: its KV and weights count, too",
    )  # fmt: skip
    what.add_argument(
        "--device", default="H100-80",
        help=f"a preset ({', '.join(DEVICES)}), with a number in front for a tensor-parallel "
        "group: 4xH100-80 (default H100-80)",
    )  # fmt: skip
    what.add_argument("--host", default="512GB", metavar="SIZE", help="host memory for KV")
    what.add_argument("--disk", default="4TB", metavar="SIZE", help="disk space for KV")
    what.add_argument(
        "--context", type=int, default=32768, metavar="TOKENS", help="context to plan for"
    )
    what.add_argument(
        "--new", type=int, default=128, metavar="TOKENS",
        help="tokens of a prompt after the prefix that hits (default 128)",
    )  # fmt: skip
    what.add_argument(
        "--table", nargs="?", const=_TABLE, metavar="MODEL@TOKENS,...",
        help="print only the KV of these contexts and how many fit in the whole device "
        f"(without a list: {_TABLE})",
    )  # fmt: skip
    _add_assumptions(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw the decode-time split")
    return parser


def _add_assumptions(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("assumptions")
    how.add_argument(
        "--mem-fraction", type=float, default=0.9, metavar="X",
        help="part of device memory for weights and KV (default 0.9, as SGLang's default is near)",
    )  # fmt: skip
    how.add_argument(
        "--weight-bytes", type=float, metavar="B",
        help="bytes per parameter (default: as the config says that they are quantised, else 2)",
    )  # fmt: skip
    how.add_argument(
        "--parameters", metavar="N[:ACTIVE]",
        help="how many there are, and how many a token uses, where a config doesn't tell: 48B:3B",
    )  # fmt: skip
    how.add_argument(
        "--kv-bytes", type=float, default=2.0, metavar="B", help="bytes per element of KV"
    )
    how.add_argument(
        "--nominal", action="store_true",
        help="count the parameters that the model's name states, 8e9 for 8B, not those it has",
    )  # fmt: skip
    how.add_argument(
        "--host-link", metavar="SIZE",
        help="bytes per second between host and device, such as 25GB (default: the device's)",
    )  # fmt: skip
    how.add_argument(
        "--disk-link", default="3GB", metavar="SIZE",
        help="bytes per second read from disk (default 3GB, about one NVMe drive)",
    )  # fmt: skip
    how.add_argument(
        "--disk-latency-s", type=float, default=200e-6, metavar="S", help="of a batch of reads"
    )
    how.add_argument(
        "--batches", default="1,32", metavar="N,N", help="batch sizes of the decode-time split"
    )


def _load_model(chosen: argparse.Namespace, name: str) -> Loaded:
    return load_model(
        name,
        Overrides(
            parameters=chosen.parameters,
            weight_bytes=chosen.weight_bytes,
            kv_bytes=chosen.kv_bytes,
        ),
    )


def _weight_bytes(chosen: argparse.Namespace, model: ModelSpec) -> float:
    if not chosen.nominal:
        return model.weight_bytes
    return float(nominal_parameters(model.name) * model.weight_bytes_per_parameter)


def _print_table(chosen: argparse.Namespace, device: DeviceSpec) -> dict[str, Any]:
    rows = []
    for item in chosen.table.split(","):
        name, _, length = item.rpartition("@")
        if not name or not length.isdigit():
            raise ConfigError(f"{item!r} is no context; write MODEL@TOKENS, Qwen-7B@16000 say.")
        model = _load_model(chosen, name).model
        rows.append(
            context_memory(
                model,
                int(length),
                device.memory_bytes,
                weight_bytes=_weight_bytes(chosen, model),
                n_devices=device.n_devices,
            )
        )
    sys.stdout.write(report.context_table(rows, device.memory_bytes) + "\n")
    return {"device": asdict(device), "contexts": [asdict(row) for row in rows]}


def _cost_model(chosen: argparse.Namespace, loaded: ModelSpec, device: DeviceSpec) -> CostModel:
    model = loaded.on_group(device.n_devices)
    # What several ranks keep is read from the disk once.
    copies = model.kv_bytes_per_token / loaded.kv_bytes_per_token
    disk_link = parse_bytes(chosen.disk_link) * copies
    link = parse_bytes(chosen.host_link) if chosen.host_link else device.host_link_bandwidth
    edges = {
        (Tier.HOST, Tier.DEVICE): EdgeCost(link, device.host_link_latency_s),
        (Tier.DISK, Tier.HOST): EdgeCost(disk_link, chosen.disk_latency_s),
    }
    return CostModel(model, device, edges)


def _print_plan(chosen: argparse.Namespace, device: DeviceSpec) -> dict[str, Any]:
    planned = _load_model(chosen, chosen.model)
    if chosen.draft:
        planned = with_draft(planned, _load_model(chosen, chosen.draft).model)
    loaded, note = planned
    model = loaded.on_group(device.n_devices)
    cost = _cost_model(chosen, loaded, device)
    kv_bytes = device.memory_bytes * chosen.mem_fraction - _weight_bytes(chosen, model)
    farther = {Tier.HOST: parse_bytes(chosen.host), Tier.DISK: parse_bytes(chosen.disk)}
    # What several ranks have is kept once, but windows are not kept apart then.
    stored = model if device.n_devices == 1 else loaded.with_layers_alike()
    capacities = tier_capacities(model, kv_bytes, farther, chosen.context, stored=stored)
    lengths = doubling(min(1024, chosen.context), chosen.context)
    hits = [
        hit_cost(cost, tier, chosen.context, chosen.new, max(chosen.context, 1 << 20))
        for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK)
    ]
    costs = long_context_costs(cost, kv_bytes, (Tier.HOST, Tier.DISK), lengths)
    longest = {
        # Only what fits on the device can be decoded.
        batch: min(chosen.context, capacities[0].tokens // batch)
        for batch in _batches(chosen.batches)
    }
    splits = [
        decode_split(cost, batch, doubling(min(1024, length), length))
        for batch, length in longest.items()
        if length
    ]
    sections = [
        f"# {model.name} on {device.name}",
        report.facts(loaded, device, note),
        "## What fits",
        report.capacity_table(capacities, chosen.context),
        f"## A hit of {chosen.context:,} tokens, {chosen.new:,} new ones after it",
        report.hit_table(hits),
        "## The four costs of long context",
        report.long_context_table(costs),
        "## Where a decode iteration goes",
        *(report.split_table(rows) for rows in splits),
    ]
    sys.stdout.write("\n\n".join(sections) + "\n")
    if chosen.plot:
        _plot(cost, chosen, longest)
    return {
        "model": asdict(loaded),
        "device": asdict(device),
        "capacities": [{**asdict(row), "tier": row.tier.name.lower()} for row in capacities],
        "hits": [{**asdict(row), "tier": row.tier.name.lower()} for row in hits],
        "long_context": [
            {
                **asdict(row),
                "load_s": {tier.name.lower(): value for tier, value in row.load_s.items()},
            }
            for row in costs
        ],
        "decode_splits": [asdict(row) for rows in splits for row in rows],
    }


def _plot(cost: CostModel, chosen: argparse.Namespace, longest: Mapping[int, int]) -> None:
    from tiered_kv.plan.plot import plot_splits

    plot_splits(
        f"{cost.model.name} on {cost.device.name}: predicted decode time",
        [
            decode_split(cost, batch, [max(1, length * step // 64) for step in range(65)])
            for batch, length in longest.items()
            if length
        ],
        chosen.plot,
    )


def _batches(text: str) -> list[int]:
    batches = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not batches or min(batches) < 1 or len(batches) != len(text.split(",")):
        raise ConfigError(f"{text!r} are no batch sizes; write for example 1,32.")
    return batches


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        device = find_device(chosen.device)
        if not 0 < chosen.mem_fraction <= 1:
            raise ConfigError(f"The memory fraction must be in (0, 1], not {chosen.mem_fraction}.")
        if chosen.new < 1:
            raise ConfigError(f"A prompt needs at least 1 new token, not {chosen.new}.")
        figures = _print_table(chosen, device) if chosen.table else _print_plan(chosen, device)
    except TieredKVError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
