"""The decode-time split over context length, as an image. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiered_kv.core.errors import ConfigError
from tiered_kv.plan.costs import DecodeSplit


def plot_splits(title: str, splits: Sequence[Sequence[DecodeSplit]], path: Path) -> None:
    """Draws one panel for each batch size: stacked milliseconds over context length.

    Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("A plot needs matplotlib; run pip install matplotlib.") from None
    figure = Figure(figsize=(5.2 * len(splits), 4.2), layout="constrained")
    panels = figure.subplots(1, len(splits), squeeze=False)[0]
    for axes, rows in zip(panels, splits, strict=True):
        lengths = [row.context_tokens / 1000 for row in rows]
        axes.stackplot(
            lengths,
            [1e3 * row.fixed_s for row in rows],
            [1e3 * row.linear_s for row in rows],
            [1e3 * row.attention_s for row in rows],
            labels=["fixed", "linear layers", "attention"],
            colors=["#bbbbbb", "#4477aa", "#ee6677"],
        )
        axes.set_xlim(lengths[0], lengths[-1])
        axes.set_ylim(bottom=0)
        axes.set_title(f"batch {rows[0].batch}")
        axes.set_xlabel("context of each request, thousand tokens")
        axes.set_ylabel("decode iteration, ms")
        axes.legend(loc="upper left")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
