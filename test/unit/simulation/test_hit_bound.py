"""Bounds on prefix hits: by hand, by brute force, and by the command."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.simulation.hit_bound import (
    Accesses,
    belady_hits,
    chain,
    infinite_hits,
    lru_hits,
    main,
)
from tiered_kv.simulation.workload.request import Request

PAGE = 16


def request(number: int, blocks: Sequence[int], n_tokens: int | None = None) -> Request:
    return Request(
        request_id=number,
        arrival_s=float(number),
        blocks=array("q", blocks),
        input_tokens=len(blocks) * PAGE if n_tokens is None else n_tokens,
        output_tokens=1,
        session=None,
        slo_class="standard",
        ttft_slo_s=None,
        tbt_slo_s=None,
    )


def work(prompts: Iterable[Sequence[int]]) -> Accesses:
    return chain((request(n, blocks) for n, blocks in enumerate(prompts)), PAGE)


def test_a_hit_ends_at_the_first_difference() -> None:
    assert infinite_hits(work([[1, 2, 3], [1, 9, 3], [1, 2, 3, 4]])) == 1 + 3


def test_equal_blocks_after_a_difference_are_not_the_same() -> None:
    made = work([[1, 7], [2, 7]])
    assert made.n_distinct_pages == 4


def test_a_partial_page_counts_or_not() -> None:
    prompts = [request(0, [1, 2], 20), request(1, [1, 2], 20)]
    assert infinite_hits(chain(prompts, PAGE)) == 2
    assert infinite_hits(chain(prompts, PAGE, with_partial=False)) == 1


def test_answers_are_found_if_they_count() -> None:
    first = request(0, [1, 2], 20)
    first.output_blocks = array("q", [2, 3])
    second = request(1, [1, 2, 3, 4])
    assert infinite_hits(chain([first, second], PAGE, with_outputs=True)) == 3
    assert infinite_hits(chain([first, second], PAGE)) == 2


def test_lru_by_hand() -> None:
    made = work([[1, 2], [3], [1, 2]])
    assert lru_hits(made, 3) == 2
    # Of [1, 2] page 1 was used before page 2, so it goes first, and 2 alone is no prefix.
    assert lru_hits(made, 2) == 0
    assert lru_hits(made, 2, leaves_first=True) == 1


def best_by_search(made: Accesses, n_pages: int) -> int:
    """The most hits any choice of what to keep can give."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for access in made.accesses:
        reached: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            count = 0
            while count < access.n_prompt and access.pages[count] in held:
                count += 1
            pool = sorted(held | set(access.pages))
            for kept in itertools.combinations(pool, min(n_pages, len(pool))):
                key = frozenset(kept)
                reached[key] = max(reached.get(key, 0), hits + count)
        best = reached
    return max(best.values())


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6)


@given(prompts=prompts, n_pages=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_belady_is_the_optimum(prompts: list[list[int]], n_pages: int) -> None:
    made = work(prompts)
    assert belady_hits(made, n_pages) == best_by_search(made, n_pages)


@given(prompts=prompts, n_pages=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_no_cache_beats_belady_and_none_the_infinite(
    prompts: list[list[int]], n_pages: int
) -> None:
    made = work(prompts)
    limit = belady_hits(made, n_pages)
    assert lru_hits(made, n_pages) <= limit <= infinite_hits(made)
    assert lru_hits(made, n_pages, leaves_first=True) <= limit
    everything = made.n_distinct_pages
    assert lru_hits(made, everything) == belady_hits(made, everything) == infinite_hits(made)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": t, "input_length": 1024, "output_length": 1, "hash_ids": ids}
        for t, ids in enumerate([[1, 2], [3, 4], [1, 2], [1, 5]])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = tmp_path / "hits.json"
    spec = f"mooncake:{path}"
    assert main(["--workload", spec, "--capacities", "1k,2048", "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    assert found["infinite"] == 3 / 8
    assert [bound["capacity_tokens"] for bound in found["bounds"]] == [1000, 2048]
    assert found["bounds"][1]["belady"] == 3 / 8
    assert "| infinite | 37.5% |" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workload", "mooncake:/nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: /nowhere.jsonl can't be read")
