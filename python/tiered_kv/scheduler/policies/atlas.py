"""Adaptive thread-level attained service: ATLAS of Agentix (NSDI 2026; arXiv 2502.13965, Autellix).

A call counts with the longest path of calls that led to it, as known when it came, and not with
what its siblings were given: branches that run beside one another do not push each other back. Of
programs whose calls follow one another it is `plas`.
"""

from __future__ import annotations

from tiered_kv.scheduler.policies.plas import LeastAttainedProgram
from tiered_kv.scheduler.request import QueuedRequest


class LeastAttainedPath(LeastAttainedProgram):
    """Queues of doubling length, as there."""

    def attained_s(self, request: QueuedRequest) -> float:
        """Seconds of service on the path to it."""
        return self.programs.path_s(request)
