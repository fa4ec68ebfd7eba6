"""`kill -9` of a writing process, at random instants, round after round on one directory.

Guaranteed: every page that was acknowledged is there and equal; no page that is returned differs
from what was written; where the budget is small, an acknowledged page may have made room for
another, but is never returned torn; what was stored when reclaim was cut off is there, even if the
index is lost; what was cleared before something else was acknowledged is not there. Looked at after
most kills, but not after all: the next process, too, may have to begin with what a kill has left,
and be killed while it does; now and then without an index, which it rebuilds.

Rounds take turns between the I/O paths; half of the runs are encrypted. A third of the kills come
from outside at a random time, the others at a system call of the store or a step of its index,
drawn at random from all of them or from those in one place: starting, rebuilding the index,
committing, reclaiming, deleting, clearing, upkeep, closing, the middle of a write.

There are 48 rounds in all, half a second each. The whole is a thousand, in one run:
`TIERED_KV_KILL_ROUNDS=1000 pytest test/fault/test_disk_kill.py`, or `-m long`.
TIERED_KV_KILL_REPORT names a file that is told what was done.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiered_kv.tiers.disk.index import index_files
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

sys.path.insert(0, str(Path(__file__).parent))

from disk_writer import (
    BATCH_PAGES,
    CARRY,
    NAME_BYTES,
    SEEDS_PER_ROUND,
    TEAR,
    THREADS,
    namespace_of,
    page_hash,
    page_payload,
    size_of,
)

MIB = 1 << 20
RUNS = 6
ROUNDS = int(os.environ.get("TIERED_KV_KILL_ROUNDS", "48"))
ALL_ROUNDS = 1000
REPORT = os.environ.get("TIERED_KV_KILL_REPORT")
LONGEST_ROUND_S = 0.4
MOST_STEPS = 2000
SAMPLE = 200
KEY = bytes(range(32))

STARTS = ("start", "rebuild")
PLACES = {
    "ample": ("start", "commit", "new segment", "upkeep", "close", TEAR),
    "churn": ("start", "commit", "reclaim", CARRY, CARRY, "delete", "upkeep", "close", TEAR),
    "clears": ("start", "commit", "clear", "delete", "upkeep", "close", TEAR),
}
"""Where a process may be told to kill itself."""
REBUILDS = {TEAR: 0.8, CARRY: 0.9, "reclaim": 0.5, "clear": 0.5, "delete": 0.5}
"""How often the index is lost after a death in such a place; 0.05 elsewhere. What was cut off is in
no index: only who rebuilds it meets it."""
FEW_STEPS = {"start": 25, "close": 12, CARRY: 12}
"""Places that are soon left."""


class Zygote:
    """The process that the writers are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "disk_writer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, **order: object) -> list[str]:
        """What a writer said until it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        lines = []
        while not (line := self._process.stdout.readline()).startswith("end "):
            assert line, "the zygote has died"
            lines.append(line)
        assert os.WTERMSIG(int(line.split()[1])) == signal.SIGKILL, lines[-3:]
        # The last line but one may have been cut by the kill; `\nend` closes it.
        if lines and not lines[-1].strip():
            lines.pop()
        return [each.rstrip("\n") for each in lines]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


class Said:
    """What a writer has said until it was killed: by clears, which pages there must be."""

    def __init__(self, lines: list[str]) -> None:
        # Of each page: clears that were over before it was written, and begun when it was stored.
        self.pages: dict[int, tuple[int, int]] = {}
        self.n_clears = 0
        self.stored: set[str] = set()
        """The beginnings of the names of all pages that could be read at the end, if it said so."""
        self.is_ready = "ready" in lines
        self.place = "anywhere" if self.is_ready else "start"
        for line in lines:
            kind, *numbers = line.split()
            if kind == "b":
                self.n_clears = max(self.n_clears, int(numbers[0]))
            elif kind == "w":
                done, begun, *seeds = map(int, numbers)
                self.n_clears = max(self.n_clears, begun)
                self.pages |= dict.fromkeys(seeds, (done, begun))
            elif kind == "k":
                self.stored = {*line.split()[1:]}
            elif kind == "x":
                self.place = line.removeprefix("x ")
        # Something was acknowledged after so many clears: they are over for good.
        self.generation = max((done for done, _ in self.pages.values()), default=0)

    def kept(self) -> list[int]:
        """Acknowledged, and not cleared since."""
        return [seed for seed, (done, _) in self.pages.items() if done == self.n_clears]

    def cleared(self) -> list[int]:
        """Cleared, and something acknowledged since then."""
        return [seed for seed, (_, begun) in self.pages.items() if begun < self.generation]


class Death:
    """How a process is to die, and what it finds at its start."""

    def __init__(self, choose: random.Random, kind: str, *, rebuilds: bool) -> None:
        self.rebuilds = rebuilds
        self.is_looked_at = choose.random() < 0.6
        self.order: dict[str, object] = {"n_steps": None, "place": None, "closes_after_s": None}
        if choose.random() < 1 / 3:
            longest_s = choose.choice((0.06, LONGEST_ROUND_S))
            self.order["lives_s"] = choose.uniform(0, longest_s)
            return
        self.order["lives_s"] = 3 * LONGEST_ROUND_S
        place = "rebuild" if self.rebuilds else choose.choice((None, *PLACES[kind]))
        # One in eight of those that die anywhere dies at the start.
        most, least = (MOST_STEPS, 0.45) if place is None else (FEW_STEPS.get(place, 40), 0.0)
        self.order |= {"n_steps": int(most ** choose.uniform(least, 1.0)), "place": place}
        if place == "close":
            self.order["closes_after_s"] = choose.uniform(0, LONGEST_ROUND_S)


class Run:
    """Rounds on one directory."""

    def __init__(self, directory: Path, kind: str, capacity_mib: int, page_bytes: int) -> None:
        self.directory = directory
        self.kind = kind
        self.capacity_bytes = capacity_mib * MIB
        self.page_bytes = page_bytes
        self.kept: set[int] = set()
        """Acknowledged and not cleared since."""
        self.cleared: list[int] = []
        """Cleared, and never to come back."""
        self.unseen: list[range] = []
        """What rounds may have written that nobody has looked at yet."""
        self.n_acknowledged = self.n_checked = self.n_clears = self.n_looks = self.n_gone = 0
        self.n_damaged = 0
        self.places: Counter[str] = Counter()
        self.place = ""
        """Where the last process was killed."""
        self.stored: set[int] = set()
        """Acknowledged, and not given up when reclaim was cut off."""
        self.n_rebuilds = self.n_stored = 0
        self._buffer = memoryview(mmap.mmap(-1, 2 * page_bytes))

    def absorb(self, first_seed: int, said: Said) -> None:
        """Take note of what a killed process has said."""
        if said.generation:
            self.cleared += self.kept
        self.cleared += said.cleared()
        self.kept = {*said.kept()} | (set() if said.n_clears else self.kept)
        last = max(said.pages, default=first_seed)
        self.unseen.append(range(first_seed, last + 4 * THREADS * BATCH_PAGES))
        self.n_acknowledged += len(said.pages)
        self.n_clears += said.n_clears
        self.places[said.place] += 1
        self.place = said.place
        self.stored = {s for s in self.kept if said.stored and name_of(s) in said.stored}
        self.n_stored += len(self.stored)

    @property
    def rebuilds(self) -> float:
        """How often the index is lost now. A process that has said what it had stored may have been
        killed before it said where."""
        return REBUILDS.get(self.place, 0.05)

    def lose_index(self) -> None:
        self.n_rebuilds += 1
        for file in index_files(self.directory):
            file.unlink(missing_ok=True)

    def look(self, store: DiskStore, choose: random.Random, *, at_all: bool) -> None:
        """Nothing torn, nothing lost, nothing back that was cleared."""
        namespaces = [
            store.namespace(namespace_of(seed), size_of(seed, self.page_bytes))
            for seed in range(THREADS)
        ]
        there = {s for seeds in self.unseen for s in seeds if self._is_there(namespaces, s)}
        n_lost = sum(not self._is_there(namespaces, seed) for seed in self.stored)
        assert not n_lost, f"{n_lost} of {len(self.stored)} pages that were stored are lost"
        self.stored.clear()
        older = [s for s in self.kept if not any(s in seeds for seeds in self.unseen)]
        sample = older if at_all else choose.sample(sorted(older), min(len(older), SAMPLE))
        there |= {seed for seed in sample if self._is_there(namespaces, seed)}
        expected = {s for s in self.kept if any(s in seeds for seeds in self.unseen)} | {*sample}
        if self.kind != "churn":
            n_lost = len(expected - there)
            assert not n_lost, f"{n_lost} acknowledged pages of {len(expected)} are lost"
        back = [s for s in self.cleared if namespaces[s % THREADS].contains(page_hash(s))]
        self.n_gone += len(self.cleared)
        assert not back, f"{len(back)} pages are back that were cleared"
        stats = store.stats()
        assert stats.io_errors == 0
        # Any kill may cut off what another thread is writing. A rebuild finds that, and finds it
        # again.
        assert not stats.checksum_failures or self.n_rebuilds
        assert stats.bytes_on_disk <= self.capacity_bytes
        self.n_checked += len(expected | there)
        self.n_looks += 1
        self.unseen.clear()
        self.n_damaged += stats.checksum_failures
        if self.kind != "churn" and stats.bytes_on_disk > self.capacity_bytes / 2:
            if not at_all:
                self.look(store, choose, at_all=True)
            store.clear()
            self.cleared += self.kept
            self.kept.clear()

    def _is_there(self, namespaces: list[DiskNamespace], seed: int) -> bool:
        """Can it be read? Fails if what is read isn't what was written."""
        ns = namespaces[seed % THREADS]
        view = self._buffer[: ns.slot_bytes]
        if not ns.read_pages([page_hash(seed)], [view]):
            return False
        assert view[: ns.page_bytes] == page_payload(seed, self.page_bytes), f"{seed} is torn"
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "n_rounds",
    [
        pytest.param(ROUNDS, id="some", marks=pytest.mark.timeout(60 + ROUNDS)),
        pytest.param(
            ALL_ROUNDS, id="all", marks=[pytest.mark.long, pytest.mark.timeout(60 + ALL_ROUNDS)]
        ),
    ],
)
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize(
    ("kind", "capacity_mib", "page_bytes"),
    [("ample", 512, 23_040), ("churn", 12, 23_040), ("clears", 256, 8_192)],
    ids=["ample", "churn", "clears"],
)
def test_kill_rounds(
    tmp_path: Path,
    zygote: Zygote,
    kind: str,
    capacity_mib: int,
    page_bytes: int,
    key: bytes | None,
    n_rounds: int,
) -> None:
    run = Run(tmp_path / "disk", kind, capacity_mib, page_bytes)
    with DiskStore.open(tmp_path / "probe", capacity_bytes=8 * MIB) as store:
        paths = ["auto", "buffered", "direct"] if store.stats().direct_io else ["auto", "buffered"]
    choose = random.Random(f"{kind} {key is None}")
    began = time.monotonic()
    n_rounds = math.ceil(n_rounds / RUNS)
    for number in range(n_rounds):
        death = Death(choose, kind, rebuilds=choose.random() < run.rebuilds)
        if death.rebuilds:
            run.lose_index()
        first_seed = number * SEEDS_PER_ROUND
        lines = zygote.run(
            directory=str(run.directory),
            first_seed=first_seed,
            capacity_bytes=run.capacity_bytes,
            page_bytes=page_bytes,
            path=choose.choice(paths),
            key=None if key is None else key.hex(),
            clears=kind == "clears",
            **death.order,
        )
        run.absorb(first_seed, Said(lines))
        is_last = number == n_rounds - 1
        # The next process would give some of it up.
        must_be_there = bool(run.stored)
        if must_be_there and choose.random() < run.rebuilds:
            run.lose_index()
        # Not at what was cut off before a process has begun with it.
        if is_last or must_be_there or (death.is_looked_at and run.place != TEAR):
            with DiskStore.open(run.directory, capacity_bytes=run.capacity_bytes, key=key) as store:
                run.look(store, choose, at_all=is_last)
    n_at_start = sum(run.places[place] for place in STARTS)
    assert n_at_start < n_rounds * 3 / 4, "the writer was hardly ever alive long enough to write"
    assert run.n_acknowledged > n_rounds
    tell(
        f"{kind}, {'encrypted' if key else 'plain'}: {n_rounds} kills "
        f"({', '.join(f'{n} {place}' for place, n in run.places.most_common())}); "
        f"{run.n_acknowledged} pages acknowledged, {run.n_checked} checked in {run.n_looks} looks, "
        f"{run.n_clears} clears, {run.n_gone} times a cleared page looked for, "
        f"{run.n_rebuilds} indexes lost, {run.n_damaged} torn pages met and not returned, "
        f"{run.n_stored} times a page looked for that was stored when reclaim was cut off; "
        f"{time.monotonic() - began:.0f} s"
    )


def name_of(seed: int) -> str:
    return page_hash(seed)[:NAME_BYTES].hex()


def tell(line: str) -> None:
    print(line)
    if REPORT is not None:
        with Path(REPORT).open("a") as file:
            file.write(line + "\n")
