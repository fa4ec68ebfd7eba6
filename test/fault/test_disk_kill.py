"""`kill -9` of a writing process, at random instants, round after round on one directory.

After every kill the directory is opened again. Guaranteed: every page that was acknowledged is
there and equal; no page that is returned differs from what was written; where the budget is small,
an acknowledged page may have made room for another, but is never returned torn; what was cleared
before something else was acknowledged is not there. Rounds take turns between the I/O paths; half
of the runs are encrypted. Half of the kills come from outside at a random time, half come before or
after a system call of the store or a commit of its index, drawn at random.

There are 48 rounds in all, a few seconds each; TIERED_KV_KILL_ROUNDS=1000 is the whole.
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
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

sys.path.insert(0, str(Path(__file__).parent))

from disk_writer import BATCH_PAGES, NAMESPACE, SEEDS_PER_ROUND, THREADS, page_hash, page_payload

MIB = 1 << 20
RUNS = 6
ROUNDS = math.ceil(int(os.environ.get("TIERED_KV_KILL_ROUNDS", "48")) / RUNS)
REPORT = os.environ.get("TIERED_KV_KILL_REPORT")
LONGEST_ROUND_S = 0.4
MOST_STEPS = 2000
KEY = bytes(range(32))


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

    def __init__(self, lines: Iterable[str]) -> None:
        # Of each page: clears that were over before it was written, and begun when it was stored.
        self.pages: dict[int, tuple[int, int]] = {}
        self.n_clears = 0
        for line in lines:
            kind, *numbers = line.split()
            if kind == "b":
                self.n_clears = max(self.n_clears, int(numbers[0]))
            elif kind == "w":
                done, begun, *seeds = map(int, numbers)
                self.n_clears = max(self.n_clears, begun)
                self.pages |= dict.fromkeys(seeds, (done, begun))
        self.is_ready = any(line == "ready" for line in lines)
        # Something was acknowledged after so many clears: they are over for good.
        self.generation = max((done for done, _ in self.pages.values()), default=0)

    def kept(self) -> list[int]:
        """Acknowledged, and not cleared since."""
        return [seed for seed, (done, _) in self.pages.items() if done == self.n_clears]

    def cleared(self) -> list[int]:
        """Cleared, and something acknowledged since then."""
        return [seed for seed, (_, begun) in self.pages.items() if begun < self.generation]


def check_pages(ns: DiskNamespace, seeds: Iterable[int]) -> tuple[int, int]:
    """(pages read back, pages missing); fails on a page that is returned but not equal."""
    buffer = memoryview(mmap.mmap(-1, ns.slot_bytes))
    found = missing = 0
    for seed in seeds:
        if ns.read_pages([page_hash(seed)], [buffer]) == 1:
            assert buffer[: ns.page_bytes] == page_payload(seed, ns.page_bytes), f"{seed} is torn"
            found += 1
        else:
            missing += 1
    return found, missing


def possibly_written(first_seed: int, said: Said) -> range:
    """Everything the writer may have got to disk, acknowledged or not."""
    last = max(said.pages, default=first_seed)
    return range(first_seed, last + 4 * THREADS * BATCH_PAGES)


def draw_death(choose: random.Random) -> dict[str, object]:
    """From outside, soon or later, or at some step of its own."""
    if choose.random() < 0.5:
        return {"lives_s": choose.uniform(0, LONGEST_ROUND_S), "n_steps": None}
    # One in eight of these dies while it opens the store.
    return {"lives_s": 5.0, "n_steps": int(MOST_STEPS ** choose.uniform(0.45, 1.0))}


class Run:
    """Rounds on one directory."""

    def __init__(self, directory: Path, capacity_mib: int, key: bytes | None, page_bytes: int):
        self.directory = directory
        self.capacity_bytes = capacity_mib * MIB
        self.key = key
        self.page_bytes = page_bytes
        self.kept: list[int] = []
        self.n_acknowledged = self.n_checked = self.n_clears = 0

    def open(self) -> DiskStore:
        return DiskStore.open(self.directory, capacity_bytes=self.capacity_bytes, key=self.key)

    def check(
        self, store: DiskStore, first_seed: int, said: Said, sample: list[int], *, is_ample: bool
    ) -> None:
        """After a kill: nothing torn, nothing lost, nothing back that was cleared."""
        ns = store.namespace(NAMESPACE, self.page_bytes)
        kept = said.kept()
        found, _ = check_pages(ns, possibly_written(first_seed, said))
        old, missing = check_pages(ns, kept + sample)
        if is_ample:
            assert missing == 0, f"{missing} acknowledged pages are lost"
        back, _ = check_pages(ns, said.cleared())
        if said.generation:
            back += check_pages(ns, self.kept)[0]
        assert back == 0, f"{back} pages are back that were cleared"
        stats = store.stats()
        assert stats.checksum_failures == stats.io_errors == 0
        assert stats.bytes_on_disk <= self.capacity_bytes
        self.kept = kept if said.n_clears else self.kept + kept
        self.n_acknowledged += len(said.pages)
        self.n_checked += found + old
        self.n_clears += said.n_clears


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * ROUNDS)
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize(
    ("name", "capacity_mib", "page_bytes"),
    [("ample", 512, 23_040), ("churn", 12, 23_040), ("clears", 256, 8_192)],
    ids=["ample", "churn", "clears"],
)
def test_kill_rounds(
    tmp_path: Path,
    zygote: Zygote,
    name: str,
    capacity_mib: int,
    page_bytes: int,
    key: bytes | None,
) -> None:
    run = Run(tmp_path / "disk", capacity_mib, key, page_bytes)
    with DiskStore.open(tmp_path / "probe", capacity_bytes=8 * MIB) as store:
        paths = ["auto", "buffered", "direct"] if store.stats().direct_io else ["auto", "buffered"]
    choose = random.Random(capacity_mib)
    began = time.monotonic()
    n_ready = 0
    for number in range(ROUNDS):
        first_seed = number * SEEDS_PER_ROUND
        said = Said(
            zygote.run(
                directory=str(run.directory),
                first_seed=first_seed,
                capacity_bytes=run.capacity_bytes,
                page_bytes=page_bytes,
                path=choose.choice(paths),
                key=None if key is None else key.hex(),
                clears=name == "clears",
                **draw_death(choose),
            )
        )
        n_ready += said.is_ready
        with run.open() as store:
            is_last = number == ROUNDS - 1
            older = [] if said.n_clears else run.kept
            sample = older if is_last else choose.sample(older, min(len(older), 200))
            run.check(store, first_seed, said, sample, is_ample=name != "churn")
            if name != "churn" and store.stats().bytes_on_disk > run.capacity_bytes / 2:
                ns = store.namespace(NAMESPACE, page_bytes)
                assert check_pages(ns, run.kept)[1] == 0
                run.n_checked += len(run.kept)
                store.clear()
                run.kept.clear()
    assert n_ready > ROUNDS / 4, "the writer was hardly ever alive long enough to write"
    assert run.n_acknowledged > ROUNDS
    tell(
        f"{name}, {'encrypted' if key else 'plain'}: {ROUNDS} kills, {n_ready} of them after the "
        f"store was open; {run.n_acknowledged} pages acknowledged, {run.n_checked} checked, "
        f"{run.n_clears} clears; {time.monotonic() - began:.0f} s"
    )


def tell(line: str) -> None:
    print(line)
    if REPORT is not None:
        with Path(REPORT).open("a") as file:
            file.write(line + "\n")
