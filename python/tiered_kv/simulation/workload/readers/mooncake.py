"""Mooncake's traces (FAST'25 release): lengths and chained hashes of 512-token blocks.

One JSON object a line: `timestamp` in milliseconds, `input_length` and `output_length` in tokens,
`hash_ids` with one id per block of the prompt, the last block perhaps partly filled.
"""

from __future__ import annotations

from array import array
from pathlib import Path

from tiered_kv.simulation.workload.block_ids import blocks_spanned
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.readers.lines import (
    Line,
    is_date,
    json_lines,
    require_some,
    shown,
    start_at_zero,
)
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

UNITS_S = {"ms": 1e-3, "s": 1.0, "us": 1e-6}

# What times in milliseconds hardly are: closer than any service is asked for longer than a burst,
# with parts of a millisecond though it is asked all the time, or over months.
_BURST = 4
_LEAST_GAP_S = 0.010
_LEAST_GAP_OF_FRACTIONS_S = 0.050
_LONGEST_S = 31 * 86400.0


def read_mooncake(path: Path, block_tokens: int = 512, unit: str = "") -> RecordedWorkload:
    """The trace at `path`, at its recorded times; dates are shifted to start at 0.

    unit: of `timestamp`, `ms`, `s` or `us`; without it milliseconds, and a trace whose times can
    hardly be that is refused. Raises WorkloadError.
    """
    if unit and unit not in UNITS_S:
        raise WorkloadError(f"unit must be one of {', '.join(UNITS_S)}, not {unit!r}.")
    hashes: list[list[int]] = []
    requests: list[Request] = []
    for line in json_lines(path):
        hashes.append(_hashes(line))
        requests.append(_request(len(requests), line, block_tokens, len(hashes[-1])))
    require_some(requests, path)
    for request, blocks in zip(requests, _ids(hashes), strict=True):
        request.blocks = blocks
    times = [request.arrival_s for request in requests]
    if is_date(min(times)):
        start_at_zero(requests, path)
    else:
        for request in requests:
            request.arrival_s *= UNITS_S[unit or "ms"]
        if not unit:
            _require_milliseconds(times, path)
    return RecordedWorkload(path.stem, block_tokens, requests)


def _require_milliseconds(times: list[float], path: Path) -> None:
    """Raise WorkloadError if `times` are hardly in milliseconds."""
    span_s = (max(times) - min(times)) / 1000
    gap_s = span_s / max(1, len(times) - 1)
    is_fraction = not all(time.is_integer() for time in times)
    is_close = len(times) > _BURST and 0 < gap_s <= _LEAST_GAP_S
    if is_fraction:
        is_close = 0 < gap_s <= _LEAST_GAP_OF_FRACTIONS_S
    if is_close or span_s > _LONGEST_S:
        raise WorkloadError(
            f"{path} has {len(times):,} timestamps over {max(times) - min(times):g}, which can "
            "hardly be milliseconds as in Mooncake's traces; say the unit: unit=s, unit=us, or "
            "unit=ms if they are."
        )


def _hashes(line: Line) -> list[int]:
    hashes = line.items("hash_ids")
    for block in hashes:
        if isinstance(block, bool) or not isinstance(block, int):
            raise line.error(f"hash_ids must be whole numbers, not {shown(block)}")
    return hashes


def _ids(hashes: list[list[int]]) -> list[array[int]]:
    """Ids of 64 bits for hashes of any length: as they are, or numbered if one is longer."""
    try:
        return [array("q", blocks) for blocks in hashes]
    except OverflowError:
        numbers: dict[int, int] = {}
        return [
            array("q", [numbers.setdefault(block, len(numbers)) for block in blocks])
            for blocks in hashes
        ]


def _request(request_id: int, line: Line, block_tokens: int, n_blocks: int) -> Request:
    """A request without its blocks, its arrival still in the trace's unit."""
    input_tokens = line.count("input_length", minimum=1)
    if n_blocks not in {
        blocks_spanned(input_tokens, block_tokens),
        input_tokens // block_tokens,
    }:
        raise line.error(
            f"{n_blocks} hash_ids don't fit {input_tokens} tokens in blocks of {block_tokens}; "
            "say how large its blocks are: block_tokens=16"
        )
    return Request(
        request_id=request_id,
        arrival_s=line.time_s("timestamp"),
        blocks=array("q"),
        input_tokens=input_tokens,
        # A request that was cut off still computes a token.
        output_tokens=max(1, line.count("output_length")),
        session=None,
        slo_class="standard",
        ttft_slo_s=None,
        tbt_slo_s=None,
    )
