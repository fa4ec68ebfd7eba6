"""The histories of `test_copy_order.py` on streams that really run: here threads, on a GPU its own.

`scripts/gpu_check` plays them on a GPU (the step `order`); this is its rehearsal. Chance decides
the order here, so a wait that is left out shows sooner or later; those below within a few
histories.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from support_tiers.real_rig import run_real_history
from support_tiers.real_streams import ThreadMachine
from support_tiers.stream_double import Removed
from support_tiers.stream_rig import PATHS
from tiered_kv.tiers.streams import Wait

pytestmark = pytest.mark.timeout(120)

N_HISTORIES = 8
N_WITHOUT = 100


@pytest.fixture
def machine() -> Iterator[ThreadMachine]:
    logging.disable(logging.CRITICAL)
    machine = ThreadMachine()
    yield machine
    machine.close()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("path", PATHS)
def test_nobody_reads_what_is_not_there(machine: ThreadMachine, path: str) -> None:
    for seed in range(N_HISTORIES):
        run_real_history(machine, seed, path=path)


@pytest.mark.parametrize(
    "removed",
    [
        Removed(Wait.WRITE_FOR_LAUNCHED, of="forward"),
        Removed(Wait.LAYER_FOR_LOAD),
        Removed(Wait.WRITTEN),
    ],
    ids=str,
)
def test_a_wait_that_is_left_out_shows(machine: ThreadMachine, removed: Removed) -> None:
    def play() -> None:
        for seed in range(N_WITHOUT):
            run_real_history(machine, seed, removed)

    with pytest.raises(AssertionError, match="wrong"):
        play()
