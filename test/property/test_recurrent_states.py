"""Requests over a model whose state is a hash of all tokens: it never goes on from a wrong one.

Random prompts that share beginnings, on one rank (`support_tiers.state_machine`); the host has room
for few checkpoints, pages are evicted, and the disk loses and damages what it has. However it comes
about, the state at the end of a prompt must be the hash of that prompt, and a prompt must go on at
the deepest place at which its pages and a state are there.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from support_tiers.state_machine import STEPS, Machine


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 4))
def test_requests_go_on_from_the_state_of_their_own_tokens(
    steps: list[tuple[str, list[int], int]], n_slots: int
) -> None:
    machine = Machine(n_slots)
    for kind, prompt, number in steps:
        machine.carry_out(kind, prompt, number)
    machine.states.close(5.0)
