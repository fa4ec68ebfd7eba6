"""What was measured of each page format, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FormatResult:
    """One format. losses: mean negative log-likelihood of each stretch, in nats per token."""

    name: str
    token_bytes: float
    key_error: float
    value_error: float
    losses: list[float]
    best_tokens: list[list[int]]
    """The most likely token at each position of each stretch."""
    agreed_tokens: list[int]
    """Of each prompt's answer."""

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.losses) / len(self.losses))


@dataclass
class Report:
    """Everything about a run; `results[0]` is raw."""

    model: str
    dtype: str
    text: str
    text_tokens: int
    page_size: int
    stretch_tokens: int
    answer_tokens: int
    n_stretches: int
    n_prompts: int
    results: list[FormatResult]
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds: the samples as well, but for the best tokens."""
        whole = asdict(self)
        for result, found in zip(whole["results"], self.results, strict=True):
            del result["best_tokens"]
            result |= {"perplexity": found.perplexity, "top1_equal": top1_equal(self, found)}
        return whole


def top1_equal(report: Report, found: FormatResult) -> float:
    """Share of positions at which the most likely token is raw's."""
    raw = report.results[0].best_tokens
    pairs = [
        a == b
        for ours, theirs in zip(found.best_tokens, raw, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(pairs) / len(pairs)


def loss_difference(report: Report, found: FormatResult) -> tuple[float, float]:
    """(mean, standard error) over stretches of what a token loses against raw, in nats."""
    differences = [a - b for a, b in zip(found.losses, report.results[0].losses, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return mean, math.nan
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def table(report: Report, command: str) -> str:
    """Markdown."""
    header = [
        "format", "bytes per token", "of raw", "perplexity", "more than raw", "best token equal",
        f"equal for {report.answer_tokens} tokens", "agree for", "K changes by", "V changes by",
    ]  # fmt: skip
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    raw = report.results[0]
    for found in report.results:
        mean, error = loss_difference(report, found)
        equal = share(n == report.answer_tokens for n in found.agreed_tokens)
        agreed = sum(found.agreed_tokens) / len(found.agreed_tokens)
        rows.append(
            [
                found.name,
                f"{found.token_bytes:,.0f}",
                f"{found.token_bytes / raw.token_bytes:.1%}",
                f"{found.perplexity:.3f}",
                "" if found is raw else f"{math.expm1(mean):+.2%} ± {error * math.exp(mean):.2%}",
                f"{top1_equal(report, found):.1%}",
                f"{equal:.1%}",
                f"{agreed:.1f} tokens",
                f"{found.key_error:.2%}",
                f"{found.value_error:.2%}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    about = (
        f"{report.model} in {report.dtype}, pages of {report.page_size} tokens. Perplexity: "
        f"{report.n_stretches} stretches of {report.stretch_tokens} tokens of {report.text} "
        f"({report.text_tokens:,} tokens), all before each stretch from pages in the format; ± is "
        f"the standard error over stretches. Agreement: greedy answers to {report.n_prompts} "
        f"prompts of {2 * report.page_size} tokens and more, whole pages in the format, against "
        "raw's. K and V change by: root mean square error relative to the root mean square.\n"
    )
    return "\n".join([f"`{command}`\n", about, *lines, "", f"Took {report.seconds:.0f} s.", ""])


def share(flags: Any) -> float:
    known: Sequence[bool] = list(flags)
    return sum(known) / len(known)
