"""Data-parallel replicas: servers in one, each with requests, a tree and tiers of its own.

They start at the same moment on the same machine and have no group in common to agree over. Those
of DP attention compute each pass together, but never look at each other's requests.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiered_kv.plugin.upstream.current import arguments, hardware

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replica:
    """The replica that this process belongs to."""

    index: int
    n_replicas: int
    rank: int
    """This process's, within the replica."""
    n_ranks: int
    """Of each replica: those that share out its KV, and decide alike."""
    server: int
    """What all processes of this server have in common, and no other server."""

    @property
    def is_one_of_many(self) -> bool:
        return self.n_replicas > 1

    @property
    def process(self) -> int:
        """The number of this rank among all of the server."""
        return self.index * self.n_ranks + self.rank

    def first_word(self, value: int) -> int:
        """What the first of the server's ranks to ask gave for `value`: all get the same.

        Goes through a file that the last to ask removes. Where none can be written each keeps to
        its own.
        """
        if not self.is_one_of_many:
            return value
        path = Path(tempfile.gettempdir()) / f"tiered-kv-{os.getuid()}-{self.server:x}"
        try:
            with path.open("a+", encoding="ascii") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                said = file.read().split()
                file.write(f"{value}\n")
                if len(said) + 1 == self.n_replicas * self.n_ranks:
                    path.unlink()
                return int(said[0]) if said else value
        except OSError as error:
            logger.warning(
                "Tiered KV: replicas cannot agree on their shares of memory (%s: %s).", path, error
            )
            return value


def replica_of(ctx: TreeCacheBuildContext) -> Replica:
    """Which of the replicas of `--dp-size`, or of DP attention, builds its cache here.

    A stage of a pipeline is one in all that this says: what is on the machine is shared out alike.
    """
    if ctx.params.pp_size > 1:
        index, n_stages = ctx.params.pp_rank, ctx.params.pp_size
        server = ctx.server_args.server_number
        return Replica(index, n_stages, ctx.tp_rank, ctx.tp_size, server)
    n_replicas = arguments.replicas(ctx.server_args)
    n_groups = arguments.attention_groups(arguments.resolved(ctx.server_args))
    # Attention is tensor-parallel within a group, whose ranks are neighbours.
    n_ranks = ctx.tp_size // n_groups
    index, rank = divmod(ctx.tp_rank, n_ranks)
    if n_groups == 1 and n_replicas > 1:
        # Of one server alone: a router may number servers that know nothing of each other.
        index = hardware.replica_index(ctx.tp_worker)
    return Replica(index, n_replicas, rank, n_ranks, ctx.server_args.server_number)
