"""Data-parallel replicas: servers in one, each with requests, a tree and tiers of its own.

They start at the same moment on the same machine and have no group in common to agree over.
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
    n_ranks: int
    """Of each replica."""
    server: int
    """What all processes of this server have in common, and no other server."""

    @property
    def is_one_of_many(self) -> bool:
        return self.n_replicas > 1

    def process(self, rank: int) -> int:
        """The number of this replica's rank `rank` among all ranks of the server."""
        return self.index * self.n_ranks + rank

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
    """Which of the replicas of `--dp-size` builds its cache here."""
    n_replicas = int(arguments.resolved(ctx.server_args).dp_size)
    # A router may number servers that know nothing of each other.
    index = hardware.replica_index(ctx.tp_worker) if n_replicas > 1 else 0
    return Replica(index, n_replicas, ctx.tp_size, ctx.server_args.server_number)
