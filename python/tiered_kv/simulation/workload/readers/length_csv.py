"""Traces of arrivals and lengths only: Azure's and BurstGPT's CSV files.

They say nothing of shared prefixes: every prompt is its own, so nothing can be reused.

Azure (azure_llm_2023 and _2024): TIMESTAMP, ContextTokens, GeneratedTokens.
BurstGPT (arXiv 2401.17644): Timestamp in seconds, "Request tokens", "Response tokens".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tiered_kv.simulation.workload.block_ids import blocks_spanned, own_blocks
from tiered_kv.simulation.workload.readers.lines import csv_lines, start_at_zero
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

DEFAULT_BLOCK_TOKENS = 64


def read_azure(path: Path, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> RecordedWorkload:
    """The trace at `path`, its first arrival at 0. Raises WorkloadError."""
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    rows = (
        (
            line.time_s("TIMESTAMP"),
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
        (line.time_s("Timestamp"), line.count("Request tokens"), n_output)
        for line in csv_lines(path, columns)
        if line.has("Response tokens") and (n_output := line.count("Response tokens"))
    )
    return _workload(path, block_tokens, rows)


def _workload(
    path: Path, block_tokens: int, rows: Iterable[tuple[float, int, int]]
) -> RecordedWorkload:
    """`rows` have arrival in seconds, input and output tokens."""
    requests = [
        Request(
            request_id=request_id,
            arrival_s=arrival_s,
            blocks=own_blocks(request_id, 0, blocks_spanned(max(1, n_input), block_tokens)),
            input_tokens=max(1, n_input),
            output_tokens=max(1, n_output),
            session=None,
            slo_class="standard",
            ttft_slo_s=None,
            tbt_slo_s=None,
        )
        for request_id, (arrival_s, n_input, n_output) in enumerate(sorted(rows))
    ]
    start_at_zero(requests, path)
    return RecordedWorkload(path.stem, block_tokens, requests)
