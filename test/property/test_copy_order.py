"""The order of copies and forward passes on a device, under schedules that nobody would wish for.

A history (`support_tiers.overlap_history`) is what a scheduler does while passes and copies run
late: KV is written to the host that is still being computed, pages are freed and given to others
while they are copied, requests are retracted, parked, and come back, loads follow each other, are
made for nobody, or fail in their middle. Passes look at every byte that they read, the host at
every page that it has. The device (`stream_double`) does the work in any order that the waits
allow; a wait that is left out must show.

TIERED_KV_PROPERTY_EXAMPLES raises the number of histories.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support_tiers.overlap_history import run_history
from support_tiers.removed_waits import NEEDED, first_caught, name_of, schedules
from support_tiers.stream_double import Removed
from support_tiers.stream_rig import PATHS
from tiered_kv.tiers.streams import Wait

pytestmark = pytest.mark.timeout(600)

N_HISTORIES = int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "60"))
#: Enough for the wait that is the hardest to miss.
N_WITHOUT = 400
DOCUMENT = Path(__file__).parents[2] / "docs" / "overlap.md"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Copies that fail are part of the histories."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("path", PATHS)
def test_nobody_reads_what_is_not_there(path: str) -> None:
    for seed, schedule in schedules(N_HISTORIES):
        run_history(seed, schedule, path=path)


@pytest.mark.parametrize(("removed", "path"), NEEDED, ids=map(name_of, NEEDED))
def test_every_wait_is_needed(removed: Removed, path: str) -> None:
    assert first_caught(removed, N_WITHOUT, path) is not None


def test_every_wait_is_left_out_once() -> None:
    assert {removed.why for removed, _ in NEEDED} == set(Wait)


def test_the_document_lists_them_all() -> None:
    text = DOCUMENT.read_text()
    for removed, path in NEEDED:
        assert f"| {removed} | {path} |" in text
