"""How long the forest keeps the scheduler's thread busy, beside SGLang's own radix tree.

Operations, on a prompt of N tokens that is in the tree as one node, or as a path of nodes of 64
tokens each (what turn after turn of a chat leaves behind):

  match          find the whole prompt
  match + slots  the same, and put the slots of all its nodes together, as the engine needs them
  insert         one node: N new tokens into an empty forest, page hashes included
                 path: the prompt again with one new page at its end
  pin            pin the prompt's last node and unpin it again (its whole path, both times)
  split          cut a node of N tokens in the middle

Times are in milliseconds: the best and the median of the repeats. The best is what the code costs;
the median also shows what else the machine was doing. "SGLang" is the best time of upstream's
cache for the same thing in the same run, "ratio" is its best time over ours (larger is better for
us). Upstream hashes no pages at insert, so there we do more. It has no split of its own. --upstream
says which of its caches: `radix`, RadixCache, which 0.5.17 serves with; `rust` and `python`, the
two cores of UnifiedRadixCache, which 0.5.23 serves with.

The budgets, checked by --check on the best times: at page size 64 and 131072 tokens a match takes
at most 3 ms, on one node or on a path, and an insert of all tokens at most 6 ms.

Examples:
  python benchmark/micro/forest.py                      the full table (a minute or two)
  python -m benchmark.micro.forest --upstream rust      beside SGLang 0.5.23
  python benchmark/micro/forest.py --check --no-upstream --tokens 131072 --page-sizes 64
                                                        the budgets only (seconds)
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash

NODE_TOKENS = 64
UPSTREAM = ("radix", "rust", "python")
BUDGETS_MS = {
    ("match", "one node", 64, 131072): 3.0,
    ("match", "path", 64, 131072): 3.0,
    ("insert", "one node", 64, 131072): 6.0,
}
# One repetition: what is to be done before the clock starts, and what is timed.
Prepared = Callable[[], object]
Operation = Callable[[], Prepared]


@dataclass(frozen=True)
class Measured:
    best_ms: float
    median_ms: float


def prompt_of(n_tokens: int) -> array[int]:
    return array("q", range(1_000, 1_000 + n_tokens))


def same(call: Prepared) -> Operation:
    """An operation that needs no preparation."""
    return lambda: call


class OurForest:
    """`tiered_kv.forest`."""

    def operations(self, shape: str, page_size: int, n_tokens: int) -> dict[str, Operation]:
        prompt, slots = prompt_of(n_tokens + page_size), np.arange(n_tokens + page_size)
        forest = Forest(page_size)
        root = forest.root(namespace_hash("benchmark"))
        forest.insert(root, prompt, slots[:n_tokens], limit=n_tokens)
        if shape == "path":
            for end in range(n_tokens - NODE_TOKENS, 0, -NODE_TOKENS):
                forest.match(root, prompt, end)
        last = forest.match(root, prompt, n_tokens).last

        def match_slots() -> object:
            path = forest.match(root, prompt, n_tokens).path
            return np.concatenate([node.slots(Tier.DEVICE) for node in path])

        def pin() -> None:
            forest.pin(last, Tier.DEVICE)
            forest.unpin(last, Tier.DEVICE)

        def insert_all() -> Prepared:
            empty = Forest(page_size)
            anchor = empty.root(namespace_hash("benchmark"))
            return lambda: (empty.insert(anchor, prompt, slots[:n_tokens], limit=n_tokens), anchor)

        def insert_one_page() -> Prepared:
            for node in last.children.values():
                forest.evict(node, Tier.DEVICE)
                break
            return lambda: forest.insert(root, prompt, slots)

        def split() -> Prepared:
            whole = Forest(page_size)
            anchor = whole.root(namespace_hash("benchmark"))
            node = whole.insert(anchor, prompt, slots[:n_tokens], limit=n_tokens).last
            return lambda: (whole.split(node, node.n_pages // 2), anchor)

        operations = {
            "match": same(lambda: forest.match(root, prompt, n_tokens)),
            "match + slots": same(match_slots),
            "insert": insert_one_page if shape == "path" else insert_all,
            "pin": same(pin),
        }
        if shape == "one node":
            operations["split"] = split
        return operations


class UpstreamRadixCache:
    """SGLang's `RadixCache`; raises ImportError if SGLang is not installed."""

    def __init__(self) -> None:
        import torch
        from sglang.srt.mem_cache import base_prefix_cache, radix_cache

        self._torch = torch
        self._cache = radix_cache.RadixCache
        self._key = radix_cache.RadixKey
        self._match_params = base_prefix_cache.MatchPrefixParams
        self._insert_params = base_prefix_cache.InsertParams

    def operations(self, shape: str, page_size: int, n_tokens: int) -> dict[str, Operation]:
        prompt = prompt_of(n_tokens + page_size)
        slots = self._torch.arange(n_tokens + page_size)

        def insert(cache: Any, end: int) -> object:
            return cache.insert(self._insert_params(key=self._key(prompt[:end]), value=slots[:end]))

        def match(cache: Any, end: int) -> Any:
            return cache.match_prefix(self._match_params(key=self._key(prompt, limit=end)))

        def new_cache() -> Any:
            return self._cache.create_simulated(page_size=page_size)

        cache = new_cache()
        insert(cache, n_tokens)
        if shape == "path":
            for end in range(n_tokens - NODE_TOKENS, 0, -NODE_TOKENS):
                match(cache, end)
        last = match(cache, n_tokens).last_device_node

        def pin() -> None:
            cache.inc_lock_ref(last)
            cache.dec_lock_ref(last)

        def insert_all() -> Prepared:
            empty = new_cache()
            return lambda: insert(empty, n_tokens)

        def insert_one_page() -> Prepared:
            for child in list(last.children.values()):
                cache._delete_leaf(child)
            return lambda: insert(cache, n_tokens + page_size)

        return {
            "match + slots": same(lambda: match(cache, n_tokens)),
            "insert": insert_one_page if shape == "path" else insert_all,
            "pin": same(pin),
        }


class UpstreamUnifiedCache:
    """SGLang 0.5.23's `UnifiedRadixCache`; raises ImportError beside another release."""

    def __init__(self, core: str) -> None:
        import torch

        from benchmark.micro.unified_tree import UnifiedTree

        UnifiedTree(core, 1)
        torch.set_num_threads(1)  # on a busy machine, copies would wait for their threads
        self._arange = torch.arange
        self._new = functools.partial(UnifiedTree, core)

    def operations(self, shape: str, page_size: int, n_tokens: int) -> dict[str, Operation]:
        prompt = prompt_of(n_tokens + page_size)
        slots = self._arange(n_tokens + page_size)
        tree = self._new(page_size)
        tree.insert(prompt[:n_tokens], slots[:n_tokens])
        if shape == "path":
            for end in range(n_tokens - NODE_TOKENS, 0, -NODE_TOKENS):
                tree.match(prompt, end)
        found = tree.match(prompt, n_tokens)
        assert found.device_prefix_len == n_tokens

        def insert_all() -> Prepared:
            empty, key = self._new(page_size), prompt[:n_tokens]
            return lambda: empty.insert(key, slots[:n_tokens])

        def insert_one_page() -> Prepared:
            if tree.match(prompt).device_prefix_len > n_tokens:
                tree.evict(page_size)
            return lambda: tree.insert(prompt, slots)

        return {
            "match": same(lambda: tree.match(prompt, n_tokens)),
            "match + slots": same(lambda: tree.slots(tree.match(prompt, n_tokens))),
            "insert": insert_one_page if shape == "path" else insert_all,
            "pin": same(lambda: tree.pin(found)),
        }


def measure(operation: Operation, repeats: int, budget_s: float = 2.0) -> Measured:
    """Time `operation` up to `repeats` times, fewer (at least 3) once `budget_s` is used up."""
    times_ms: list[float] = []
    spent = 0.0
    gc.collect()
    gc.disable()
    try:
        while len(times_ms) < repeats and (spent < budget_s or len(times_ms) < 3):
            call = operation()
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            times_ms.append(seconds * 1e3)
            spent += seconds
    finally:
        gc.enable()
    return Measured(min(times_ms), statistics.median(times_ms))


def load_upstream(which: str) -> UpstreamRadixCache | UpstreamUnifiedCache | None:
    print("Importing SGLang for comparison (takes some seconds; --no-upstream skips it).")
    try:
        return UpstreamRadixCache() if which == "radix" else UpstreamUnifiedCache(which)
    except ImportError as error:
        print(f"SGLang's cache is not there ({error}): its columns stay empty.")
        return None


def run(arguments: argparse.Namespace) -> list[str]:
    """Print the table; returns the budgets that were broken, one sentence each."""
    upstream = None if arguments.no_upstream else load_upstream(arguments.upstream)
    broken = []
    print(
        f"{'page':>4} {'tokens':>7} {'shape':<8} {'operation':<13} "
        f"{'best':>9} {'median':>9} {'SGLang':>9} {'ratio':>7} {'budget':>7}"
    )
    for page_size in arguments.page_sizes:
        for n_tokens in arguments.tokens:
            for shape in ("one node", "path"):
                theirs = upstream.operations(shape, page_size, n_tokens) if upstream else {}
                ours = OurForest().operations(shape, page_size, n_tokens)
                for name, operation in ours.items():
                    mine = measure(operation, arguments.repeats)
                    other = theirs.get(name)
                    other_ms = measure(other, arguments.repeats).best_ms if other else None
                    budget = BUDGETS_MS.get((name, shape, page_size, n_tokens))
                    print(
                        f"{page_size:>4} {n_tokens:>7} {shape:<8} {name:<13} "
                        f"{mine.best_ms:>9.3f} {mine.median_ms:>9.3f} "
                        f"{'' if other_ms is None else f'{other_ms:.3f}':>9} "
                        f"{'' if other_ms is None else f'{other_ms / mine.best_ms:.1f}x':>7} "
                        f"{'' if budget is None else f'{budget:.1f}':>7}",
                        flush=True,
                    )
                    if budget is not None and mine.best_ms > budget:
                        broken.append(
                            f"{name} of {n_tokens} tokens ({shape}, page size {page_size}) took "
                            f"{mine.best_ms:.2f} ms at best, the budget is {budget:.1f} ms."
                        )
    return broken


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1024, 8192, 32768, 131072],
        help=f"prompt lengths, multiples of {NODE_TOKENS} (default: 1024 8192 32768 131072)",
    )
    parser.add_argument(
        "--page-sizes",
        type=int,
        nargs="+",
        default=[1, 16, 64],
        help=f"tokens per page, divisors of {NODE_TOKENS} (default: 1 16 64)",
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="times each operation is timed (default: 15)"
    )
    parser.add_argument("--upstream", choices=UPSTREAM, default="radix", help="SGLang's cache")
    parser.add_argument("--no-upstream", action="store_true", help="do not compare with SGLang")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a budget is broken")
    arguments = parser.parse_args()
    if any(n < 2 * NODE_TOKENS or n % NODE_TOKENS for n in arguments.tokens):
        parser.error(f"--tokens takes multiples of {NODE_TOKENS}, at least {2 * NODE_TOKENS}")
    if any(size < 1 or NODE_TOKENS % size for size in arguments.page_sizes):
        parser.error(f"--page-sizes takes divisors of {NODE_TOKENS}")
    if arguments.repeats < 3:
        parser.error("--repeats takes at least 3")
    selected = {(size, n) for size in arguments.page_sizes for n in arguments.tokens}
    if arguments.check and not selected >= {case[2:] for case in BUDGETS_MS}:
        parser.error("--check needs the sizes that have budgets: --page-sizes 64 --tokens 131072")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    broken = run(arguments)
    for sentence in broken:
        print(f"Over budget: {sentence}")
    return 1 if arguments.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
