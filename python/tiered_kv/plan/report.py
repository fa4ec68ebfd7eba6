"""Plans as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tiered_kv.core.device_spec import DeviceSpec
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_kv import CHUNK_TOKENS
from tiered_kv.core.model_spec import ModelSpec
from tiered_kv.plan.capacity import ContextMemory, TierCapacity
from tiered_kv.plan.costs import DecodeSplit, HitCost, LongContextCost


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [_row(header), "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def facts(model: ModelSpec, device: DeviceSpec, note: str = "") -> str:
    """What the plan's figures start from, and what they leave out; `note` among it."""
    kib = model.kv_bytes_per_token / 1024
    billions = f"{model.n_parameters / 1e9:.2f}B parameters{_active(model)}"
    said = [f"{model.attention_kind}, {billions}, {kib:.1f} KiB of KV per token."]
    kept = model.on_group(device.n_devices).kv_bytes_per_token / 1024
    if kept > kib:
        said.append(
            f"{device.n_devices} tensor-parallel ranks keep {kept:.1f} KiB of a token together: "
            "each keeps whole KV heads, and latents whole."
        )
    if note:
        said.append(note)
    if model.weight_bytes_per_parameter != 2.0:
        said.append(
            f"Weights take {gigabytes(model.weight_bytes)}, "
            f"{model.weight_bytes_per_parameter:.2f} bytes each."
        )
    if model.kinds_without_kv:
        kinds = ", ".join(sorted(set(model.kinds_without_kv)))
        state = "the state that some keep for each request is not counted."
        if model.state_bytes:
            state = f"a checkpoint of their state takes {model.state_bytes / 1024:,.1f} KiB more."
        n_without = len(model.kinds_without_kv)
        said.append(f"{n_without} of {model.n_layers} layers ({kinds}) keep no KV; {state}")
    if model.n_kv_layers < model.n_attention_layers:
        said.append(
            f"{model.n_attention_layers - model.n_kv_layers} of {model.n_attention_layers} layers "
            "that attend read the KV of others."
        )
    said += _windows(model, device.n_devices)
    said.append(f"Times are predictions of a roofline ({device.source}).")
    return " ".join(said)


def _windows(model: ModelSpec, n_devices: int) -> list[str]:
    """What is counted of layers that look back a window only."""
    said = []
    for layers in model.attending:
        if layers.window_tokens and layers.kv_elements:
            one = (
                f"{layers.n_layers} layers look back {layers.window_tokens:,} tokens only, but are "
                "counted as if they kept all"
            )
            if layers.is_sliding and n_devices == 1:
                one += " on the device; a load brings their last window"
            said.append(one + ".")
    if model.window_kv_bytes_per_token:
        beyond = (model.kv_bytes_per_token - model.window_kv_bytes_per_token) / 1024
        said.append(f"A server that drops what their windows passed keeps {beyond:.1f} KiB beyond.")
        stored = model.stored_kv_bytes_per_token / 1024
        if n_devices == 1 and stored < model.kv_bytes_per_token / 1024:
            said.append(
                f"Host and disk keep {stored:.1f} KiB per token of long prompts: two windows for "
                f"each chunk of {CHUNK_TOKENS:,} tokens."
            )
    return said


def _active(model: ModelSpec) -> str:
    if model.n_active_parameters == model.n_parameters:
        return ""
    return f" ({model.n_active_parameters / 1e9:.2f}B active)"


def context_table(rows: Iterable[ContextMemory], memory_bytes: float) -> str:
    """KV of one context per model, in decimal GB."""
    header = ("model", "context", "KV per layer", "KV, all layers", "weights", "fit in ")
    return table(
        (*header[:-1], f"fit in {gigabytes(memory_bytes, 0)}"),
        (
            (
                row.model,
                f"{row.context_tokens:,}",
                gigabytes(row.kv_bytes_per_layer),
                gigabytes(row.kv_bytes),
                gigabytes(row.weight_bytes),
                str(row.concurrency),
            )
            for row in rows
        ),
    )


def capacity_table(rows: Iterable[TierCapacity], context_tokens: int) -> str:
    """Tokens and requests per tier."""
    return table(
        ("tier", "for KV", "tokens", f"requests of {context_tokens:,}"),
        (
            (row.tier.name.lower(), gigabytes(row.kv_bytes), f"{row.tokens:,}", f"{row.requests:,}")
            for row in rows
        ),
    )


def hit_table(rows: Iterable[HitCost]) -> str:
    """Hits against recompute."""
    return table(
        ("hit in", "load", "first token", "without", "speed-up", "pays from"),
        (
            (
                row.tier.name.lower(),
                duration(row.load_s),
                duration(row.hit_s),
                duration(row.recompute_s),
                f"{row.recompute_s / row.hit_s:.1f}x",
                "never" if row.break_even_tokens is None else f"{row.break_even_tokens:,} tokens",
            )
            for row in rows
        ),
    )


def long_context_table(rows: Sequence[LongContextCost]) -> str:
    """The four costs by context length."""
    tiers: list[Tier] = list(rows[0].load_s) if rows else []
    loads = [f"load from {tier.name.lower()}" for tier in tiers]
    return table(
        ("context", "prefill", "KV", "fit on device", "decode, per token", *loads),
        (
            (
                f"{row.context_tokens:,}",
                duration(row.prefill_s),
                gigabytes(row.kv_bytes),
                f"{row.concurrency:,}",
                duration(row.decode_s),
                *(duration(row.load_s[tier]) for tier in tiers),
            )
            for row in rows
        ),
    )


def split_table(rows: Iterable[DecodeSplit]) -> str:
    """The decode iteration's parts by context length."""
    return table(
        ("batch x context", "linear", "attention", "fixed", "attention's share"),
        (
            (
                f"{row.batch} x {row.context_tokens:,}",
                duration(row.linear_s),
                duration(row.attention_s),
                duration(row.fixed_s),
                f"{row.attention_s / (row.linear_s + row.attention_s + row.fixed_s):.0%}",
            )
            for row in rows
        ),
    )


def gigabytes(n_bytes: float, digits: int = 2) -> str:
    """Decimal gigabytes."""
    return f"{n_bytes / 1e9:.{digits}f} GB"


def duration(seconds: float) -> str:
    """Seconds, milliseconds or microseconds, three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return "0" if seconds == 0 else f"{seconds * 1e6:.2g} us"
