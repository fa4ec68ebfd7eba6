"""Mooncake's traces (FAST'25 release): lengths and chained hashes of 512-token blocks.

One JSON object a line: `timestamp` in milliseconds, `input_length` and `output_length` in tokens,
`hash_ids` with one id per block of the prompt, the last block perhaps partly filled.
"""

from __future__ import annotations

from array import array
from pathlib import Path

from tiered_kv.simulation.workload.block_ids import blocks_spanned
from tiered_kv.simulation.workload.readers.lines import Line, json_lines, require_some
from tiered_kv.simulation.workload.request import RecordedWorkload, Request


def read_mooncake(path: Path, block_tokens: int = 512) -> RecordedWorkload:
    """The trace at `path`, at its recorded times. Raises WorkloadError."""
    requests = [
        _request(request_id, line, block_tokens) for request_id, line in enumerate(json_lines(path))
    ]
    require_some(requests, path)
    return RecordedWorkload(path.stem, block_tokens, requests)


def _request(request_id: int, line: Line, block_tokens: int) -> Request:
    input_tokens = line.count("input_length", minimum=1)
    try:
        blocks = array("q", line.items("hash_ids"))
    except (TypeError, OverflowError):
        raise line.error("hash_ids must be 64-bit whole numbers") from None
    if len(blocks) not in {
        blocks_spanned(input_tokens, block_tokens),
        input_tokens // block_tokens,
    }:
        raise line.error(
            f"{len(blocks)} hash_ids don't fit {input_tokens} tokens in blocks of {block_tokens}; "
            "give the block's right size"
        )
    return Request(
        request_id=request_id,
        arrival_s=line.number_of("timestamp") / 1000,
        blocks=blocks,
        input_tokens=input_tokens,
        # A request that was cut off still computes a token.
        output_tokens=max(1, line.count("output_length")),
        session=None,
        slo_class="standard",
        ttft_slo_s=None,
        tbt_slo_s=None,
    )
