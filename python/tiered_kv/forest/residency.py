"""Where a node's KV is, as a state machine per node and tier."""

from __future__ import annotations

import enum

from tiered_kv.core.errors import IntegrityError


class Residency(enum.Enum):
    """State of one node in one tier, seen from the tier that receives the bytes."""

    ABSENT = "absent"
    """The tier holds nothing of the node."""

    LOADING = "loading"
    """Slots are reserved here; the bytes are on their way up from a farther tier."""

    RESIDENT = "resident"
    """The bytes are here and may be read."""

    WRITING_BACK = "writing_back"
    """Slots are reserved here; the bytes are on their way down from a nearer tier."""


IN_TRANSFER = frozenset({Residency.LOADING, Residency.WRITING_BACK})

_ALLOWED = frozenset(
    {
        (Residency.ABSENT, Residency.LOADING),
        (Residency.ABSENT, Residency.WRITING_BACK),
        (Residency.ABSENT, Residency.RESIDENT),
        (Residency.LOADING, Residency.RESIDENT),
        (Residency.LOADING, Residency.ABSENT),
        (Residency.WRITING_BACK, Residency.RESIDENT),
        (Residency.WRITING_BACK, Residency.ABSENT),
        (Residency.RESIDENT, Residency.ABSENT),
    }
)


def check_transition(old: Residency, new: Residency) -> None:
    """Raise IntegrityError unless a node may go from `old` to `new` in one step."""
    if (old, new) not in _ALLOWED:
        raise IntegrityError(f"A node may not go from {old.name} to {new.name} in one step.")
