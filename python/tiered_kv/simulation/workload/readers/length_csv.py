"""Traces of arrivals and lengths only: Azure's and BurstGPT's CSV files.

They say nothing of shared prefixes: every prompt is its own, so nothing can be reused.

Azure (azure_llm_2023 and _2024): TIMESTAMP, ContextTokens, GeneratedTokens.
BurstGPT (arXiv 2401.17644): Timestamp in seconds, "Request tokens", "Response tokens".
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from tiered_kv.simulation.workload.block_ids import blocks_spanned, own_blocks
from tiered_kv.simulation.workload.readers.lines import Line, csv_lines, require_some
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

DEFAULT_BLOCK_TOKENS = 64


def read_azure(path: Path, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> RecordedWorkload:
    """The trace at `path`, its first arrival at 0. Raises WorkloadError."""
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    rows = (
        (
            _seconds(line),
            line.count("ContextTokens"),
            line.count("GeneratedTokens"),
        )
        for line in csv_lines(path, columns)
    )
    return _workload(path, block_tokens, rows)


def read_burstgpt(path: Path, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> RecordedWorkload:
    """The trace at `path`, its first arrival at 0. Raises WorkloadError.

    Rows without a response are failures of the recorded service and are left out.
    """
    columns = ("Timestamp", "Request tokens", "Response tokens")
    rows = (
        (line.number_of("Timestamp"), line.count("Request tokens"), n_output)
        for line in csv_lines(path, columns)
        if (n_output := line.count("Response tokens"))
    )
    return _workload(path, block_tokens, rows)


def _workload(
    path: Path, block_tokens: int, rows: Iterable[tuple[float, int, int]]
) -> RecordedWorkload:
    """`rows` have arrival in seconds, input and output tokens."""
    taken = sorted(rows)
    require_some(taken, path)
    first_s = taken[0][0]
    requests = [
        Request(
            request_id=request_id,
            arrival_s=arrival_s - first_s,
            blocks=own_blocks(request_id, 0, blocks_spanned(max(1, n_input), block_tokens)),
            input_tokens=max(1, n_input),
            output_tokens=max(1, n_output),
            session=None,
            slo_class="standard",
            ttft_slo_s=None,
            tbt_slo_s=None,
        )
        for request_id, (arrival_s, n_input, n_output) in enumerate(taken)
    ]
    return RecordedWorkload(path.stem, block_tokens, requests)


def _seconds(line: Line) -> float:
    """A time such as "2023-11-16 18:15:46.6805900", with seven digits, perhaps with a zone."""
    text = line.text("TIMESTAMP")
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise line.error(
            f"TIMESTAMP {text!r} is no time; write it like 2023-11-16 18:15:46.680"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
