"""What each wait of the copies is for: it is left out, by its name, and wrong bytes must show.

`python -m support_tiers.removed_waits`, with `test` on PYTHONPATH, prints the table of
docs/overlap.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator

from support_tiers.overlap_history import N_KINDS, run_history
from support_tiers.stream_double import Eager, Random, Removed, Schedule, Stalled
from support_tiers.stream_rig import PATHS
from tiered_kv.tiers.streams import Wait

ACTORS = ("schedule", "forward", "to-host", "to-device", "device-to-host", "host-to-device")

#: Every wait there is. What a copy waits for are two points: each of them counts.
REMOVED = (
    Removed(Wait.LOAD_FOR_LAUNCHED, of="forward"),
    Removed(Wait.LOAD_FOR_LAUNCHED, of="schedule"),
    Removed(Wait.WRITE_FOR_LAUNCHED, of="forward"),
    Removed(Wait.WRITE_FOR_LAUNCHED, of="schedule"),
    Removed(Wait.LAYER_FOR_LOAD),
    Removed(Wait.PASSES_FOR_LOAD),
    Removed(Wait.LOADED),
    Removed(Wait.WRITTEN),
    Removed(Wait.LOAD_GIVEN_UP),
    Removed(Wait.WRITE_GIVEN_UP),
)


#: With which path each is seen. A kernel's write that fails has asked for nothing else before.
NEEDED = tuple(
    (removed, path)
    for removed, path in itertools.product(REMOVED, PATHS)
    if removed.why is not Wait.WRITE_GIVEN_UP or path == "dma"
)


def name_of(needed: tuple[Removed, str]) -> str:
    return f"{needed[0]}-{needed[1]}"


def adversaries() -> Iterator[Schedule]:
    """One or two of them never move before somebody blocks; the others at once, in two orders."""
    yield Eager()
    for n in (len(ACTORS), 1, 2):
        for stalled in itertools.combinations(ACTORS, n):
            for order in (ACTORS, ACTORS[::-1]):
                yield Stalled(frozenset(stalled), order)


def schedules(n: int) -> Iterator[tuple[int, Schedule]]:
    """`n` seeds of histories with a schedule for each: every kind of history with each adversary,
    in turn with random ones."""
    adverse = list(adversaries())
    for seed in range(n):
        number, is_random = divmod(seed // N_KINDS, 2)
        if is_random or number >= len(adverse):
            yield seed, Random(seed)
        else:
            yield seed, adverse[number]


def first_caught(removed: Removed, n: int, path: str) -> tuple[int, str] | None:
    """After how many histories something was wrong, and what; None if nothing was."""
    for seed, schedule in schedules(n):
        try:
            run_history(seed, schedule, removed, path)
        except Exception as error:
            return seed + 1, str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=2000)
    n = parser.parse_args().histories
    # Failures are part of the histories.
    logging.disable(logging.CRITICAL)
    print("| left out: who waits, and for what | path | caught by history | what is seen |")
    print("|---|---|---|---|")
    for removed, path in NEEDED:
        found = first_caught(removed, n, path)
        number, seen = ("never", "") if found is None else found
        print(f"| {removed} | {path} | {number} | {seen} |", flush=True)


if __name__ == "__main__":
    main()
