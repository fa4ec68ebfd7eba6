"""What is wrong with a trace or a workload's description."""

from __future__ import annotations

from tiered_kv.core.errors import TieredKVError


class WorkloadError(TieredKVError, ValueError):
    """A trace can't be read, or an option of a workload can't work; one sentence for the user."""
