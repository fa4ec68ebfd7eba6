"""How much of a workload's prompts a prefix cache of a given size could have held.

`python -m tiered_kv.simulation.hit_bound --help`. There is no engine and no queue: requests are
taken in the order of arrival. A request's hit is its longest cached prefix in whole pages; the hit
rate is the hit pages of all requests over all pages of their prompts. A page is one block of the
workload.

Three caches bound what a policy can do: one without limit; LRU; and Belady's, which evicts what is
needed latest and knows the future (IBM Systems Journal 5(2), 1966). With prefixes it's still the
optimum for pages of one size, as a page is never needed sooner than the page before it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from tiered_kv.core.errors import ConfigError, TieredKVError
from tiered_kv.simulation.workload.catalog import add_arguments, from_arguments
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload, whole_blocks

_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Access:
    """One request as the cache sees it: chained page numbers, equal if all before is equal."""

    pages: array[int]
    """The prompt's pages, then those that its output fills, if these count."""
    n_prompt: int
    """How many of them are the prompt's."""


@dataclass(frozen=True, slots=True)
class Accesses:
    """A workload in the order of its arrivals."""

    page_tokens: int
    accesses: list[Access]

    @property
    def n_prompt_pages(self) -> int:
        """Pages of all prompts: the denominator of hit rates."""
        return sum(access.n_prompt for access in self.accesses)

    @property
    def n_distinct_pages(self) -> int:
        """Pages that a cache without limit would hold in the end."""
        return max((max(access.pages, default=-1) for access in self.accesses), default=-1) + 1


def in_order(workload: Workload, answer_s: Callable[[Request], float]) -> Iterator[Request]:
    """All requests by arrival, if answering each takes `answer_s` seconds, whatever the load."""
    initial = workload.initial()
    waiting: list[tuple[float, int, Request]] = []
    upcoming = next(initial, None)
    while upcoming is not None or waiting:
        if upcoming is not None and (not waiting or upcoming.arrival_s <= waiting[0][0]):
            request, upcoming = upcoming, next(initial, None)
        else:
            request = heapq.heappop(waiting)[2]
        yield request
        following = workload.follow_up(request, request.arrival_s + answer_s(request))
        if following is not None:
            heapq.heappush(waiting, (following.arrival_s, following.request_id, following))


def chain(
    requests: Iterable[Request],
    page_tokens: int,
    *,
    with_partial: bool = True,
    with_outputs: bool = False,
) -> Accesses:
    """Numbers the pages of `requests` so that equal numbers mean equal prefixes.

    `with_partial` counts a prompt's partly filled last page like a full one, as block ids in
    traces suggest; a server shares whole pages only. `with_outputs` lets an answer's pages be
    found by those who ask on.
    """
    numbers: dict[tuple[int, int], int] = {}
    accesses = []
    for request in requests:
        blocks = request.blocks if with_partial else whole_blocks(request, page_tokens)
        n_prompt = len(blocks)
        if with_outputs:
            blocks = whole_blocks(request, page_tokens) + request.output_blocks
            n_prompt = min(n_prompt, len(blocks))
        pages = array("q")
        parent = -1
        for block in blocks:
            parent = numbers.setdefault((parent, block), len(numbers))
            pages.append(parent)
        accesses.append(Access(pages, n_prompt))
    return Accesses(page_tokens, accesses)


def infinite_hits(work: Accesses) -> int:
    """Hit pages of a cache without limit."""
    seen: set[int] = set()
    hits = 0
    for access in work.accesses:
        hits += _leading(access, seen)
        seen.update(access.pages)
    return hits


def lru_hits(work: Accesses, n_pages: int, *, leaves_first: bool = False) -> int:
    """Hit pages of a cache of `n_pages` that evicts the page used longest ago.

    A request uses its pages from the first to the last, so that of an old prompt the front goes
    first and strands the rest; with `leaves_first` in reverse, as a radix tree evicts.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for access in work.accesses:
        hits += _leading(access, cache)
        for page in reversed(access.pages) if leaves_first else access.pages:
            cache[page] = None
            cache.move_to_end(page)
        while len(cache) > n_pages:
            cache.popitem(last=False)
    return hits


def belady_hits(work: Accesses, n_pages: int) -> int:
    """Hit pages of a cache of `n_pages` that evicts the page whose next use is the farthest."""
    upcoming = _next_uses(work)
    # The next use of each cached page, and a heap of runs of pages with equal next uses:
    # (-next use, -depth after the run's last page, access, depth of its first). Runs of pages that
    # were used again since are outdated, which shows when they are evicted.
    cache: dict[int, int] = {}
    farthest: list[tuple[int, int, int, int]] = []
    hits = 0
    for index, (access, next_uses) in enumerate(zip(work.accesses, upcoming, strict=True)):
        hits += _leading(access, cache)
        cache.update(zip(access.pages, next_uses, strict=True))
        begin = 0
        for next_use, run in groupby(next_uses):
            end = begin + sum(1 for _ in run)
            heapq.heappush(farthest, (-next_use, -end, index, begin))
            begin = end
        while len(cache) > n_pages:
            negative_use, negative_end, source, begin = heapq.heappop(farthest)
            # Among equals the deepest first, which keeps what is cached a prefix.
            page = work.accesses[source].pages[-negative_end - 1]
            if cache.get(page) == -negative_use:
                del cache[page]
            if -negative_end - 1 > begin:
                heapq.heappush(farthest, (negative_use, negative_end + 1, source, begin))
    return hits


def _next_uses(work: Accesses) -> list[array[int]]:
    """For each page of each access, the number of the next access with that page."""
    following: dict[int, int] = {}
    found: list[array[int]] = []
    for index in range(len(work.accesses) - 1, -1, -1):
        pages = work.accesses[index].pages
        found.append(array("q", [following.get(page, _NEVER) for page in pages]))
        following.update(dict.fromkeys(pages, index))
    found.reverse()
    return found


def _leading(access: Access, cache: OrderedDict[int, None] | dict[int, int] | set[int]) -> int:
    """How many of the prompt's first pages are in `cache`."""
    for count, page in enumerate(access.pages[: access.n_prompt]):
        if page not in cache:
            return count
    return access.n_prompt


@dataclass(frozen=True, slots=True)
class Bound:
    """Hit rates, from 0 to 1, of caches of one size."""

    capacity_tokens: int
    lru: float
    lru_leaves_first: float
    belady: float


@dataclass(frozen=True, slots=True)
class HitBounds:
    """What a prefix cache could do for one workload."""

    workload: str
    requests: int
    page_tokens: int
    prompt_tokens: int
    distinct_tokens: int
    """Tokens that a cache without limit holds in the end."""
    infinite: float
    bounds: tuple[Bound, ...]


def measure(name: str, work: Accesses, capacities_tokens: Sequence[int]) -> HitBounds:
    """Hit rates at each capacity, of which whole pages are used. Shows progress on stderr."""
    total = max(1, work.n_prompt_pages)
    bounds = []
    for capacity in tqdm(capacities_tokens, desc="capacities", leave=False):
        n_pages = capacity // work.page_tokens
        bounds.append(
            Bound(
                capacity,
                lru_hits(work, n_pages) / total,
                lru_hits(work, n_pages, leaves_first=True) / total,
                belady_hits(work, n_pages) / total,
            )
        )
    return HitBounds(
        workload=name,
        requests=len(work.accesses),
        page_tokens=work.page_tokens,
        prompt_tokens=total * work.page_tokens,
        distinct_tokens=work.n_distinct_pages * work.page_tokens,
        infinite=infinite_hits(work) / total,
        bounds=tuple(bounds),
    )


def table(found: HitBounds) -> str:
    """The hit rates as a Markdown table."""
    lines = [
        (
            f"Prefix hits of {found.workload}: {found.requests:,} requests, pages of "
            f"{found.page_tokens} tokens, {found.prompt_tokens / 1e6:.1f} Mtok of prompts in whole "
            f"pages, of which {found.distinct_tokens / 1e6:.1f} Mtok are different."
        ),
        "",
        "| capacity, Mtok | LRU | LRU, leaves first | Belady |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {bound.capacity_tokens / 1e6:g} | {bound.lru:.1%} | {bound.lru_leaves_first:.1%} "
        f"| {bound.belady:.1%} |"
        for bound in found.bounds
    ]
    same = f"{found.infinite:.1%}"
    return "\n".join([*lines, f"| infinite | {same} | {same} | {same} |"])


def plot(found: HitBounds, path: Path) -> None:
    """Hit rate against capacity, as an image. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("A plot needs matplotlib; run pip install matplotlib.") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    capacities = [bound.capacity_tokens / 1e6 for bound in found.bounds]
    axes.axhline(100 * found.infinite, color="black", linestyle="--", label="infinite cache")
    axes.plot(capacities, [100 * b.belady for b in found.bounds], marker="o", label="Belady")
    axes.plot(
        capacities,
        [100 * b.lru_leaves_first for b in found.bounds],
        marker="s",
        label="LRU, leaves first",
    )
    axes.plot(capacities, [100 * b.lru for b in found.bounds], marker="x", label="LRU")
    axes.set_xscale("log", base=2)
    axes.set_xticks(capacities, [f"{capacity:g}" for capacity in capacities])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cache, million tokens")
    axes.set_ylabel("prompt pages found, %")
    axes.set_title(f"{found.workload}: prefix hits, pages of {found.page_tokens} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _capacities(text: str) -> list[int]:
    factors = {"k": 10**3, "M": 10**6, "G": 10**9}
    capacities = []
    for part in text.split(","):
        number, factor = (part[:-1], factors[part[-1]]) if part[-1:] in factors else (part, 1)
        try:
            capacities.append(round(float(number) * factor))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no number of tokens; write 500k, 2M or 8000000"
            ) from None
    return sorted(capacities)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.simulation.hit_bound",
        description="Bounds on prefix-cache hits: infinite cache, LRU and Belady by capacity. "
        "About what an 80 GB GPU keeps for an 8B model is 0.5M tokens; 2M to 8M are host memory; "
        "a disk comes near the infinite cache.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--capacities",
        type=_capacities,
        default=_capacities("0.25M,0.5M,1M,2M,4M,8M,16M"),
        metavar="TOKENS",
        help="comma-separated, with k, M or G for powers of 1000 (default 0.25M to 16M)",
    )
    parser.add_argument(
        "--whole-pages",
        action="store_true",
        help="leave out the partly filled last page of each prompt, as a server does",
    )
    parser.add_argument(
        "--outputs", action="store_true", help="keep answers too, where the workload knows them"
    )
    parser.add_argument(
        "--token-s",
        type=float,
        default=0.02,
        metavar="S",
        help="seconds per output token, for when a session's next call comes (default 0.02)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hit rate over capacity")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        workload = from_arguments(chosen)
        requests = in_order(workload, lambda request: request.output_tokens * chosen.token_s)
        work = chain(
            tqdm(requests, desc="requests", leave=False),
            workload.block_tokens,
            with_partial=not chosen.whole_pages,
            with_outputs=chosen.outputs,
        )
        if not work.n_prompt_pages:
            raise WorkloadError("No prompt fills a page; leave --whole-pages out.")
        found = measure(workload.name, work, chosen.capacities)
        sys.stdout.write(table(found) + "\n")
        if chosen.json:
            chosen.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
        if chosen.plot:
            plot(found, chosen.plot)
    except TieredKVError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
