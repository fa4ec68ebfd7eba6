"""What moves between the tiers, and when: the one place that decides it.

Every method looks at the forest and returns actions; none moves bytes or changes residency. (The
one thing it does to the forest is to split a node of which only a part is to go.)
"""

from __future__ import annotations

from collections.abc import Iterable

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import Match
from tiered_kv.memory.actions import Drop, Load, WriteBack
from tiered_kv.memory.eviction import eviction_policies


class MemoryManager:
    """Write-through to host and disk, eviction by policy, loads on demand."""

    def __init__(self, forest: Forest, config: MemoryConfig) -> None:
        """Raises ConfigError if `config` names an eviction policy that is not registered."""
        self._forest = forest
        self._eviction = eviction_policies.get(config.eviction_policy)(forest)
        self._enabled = {
            Tier.DEVICE: True,
            Tier.HOST: config.host_enabled,
            Tier.DISK: config.disk_enabled,
        }

    def is_enabled(self, tier: Tier) -> bool:
        """Whether pages are sent to `tier`."""
        return self._enabled.get(tier, False)

    def enable(self, tier: Tier) -> None:
        """Send pages to `tier` from now on."""
        self._enabled[tier] = True

    def disable(self, tier: Tier) -> None:
        """Send no more pages to `tier`, for example because it failed.

        What is there already can still be loaded and dropped.
        """
        self._enabled[tier] = False

    def on_insert(self, adopted: Iterable[Node]) -> list[WriteBack]:
        """`adopted` became RESIDENT on the device: those the host lacks are written through."""
        return self._write_through(adopted, Tier.DEVICE, Tier.HOST)

    def on_host_resident(self, nodes: Iterable[Node]) -> list[WriteBack]:
        """`nodes` became RESIDENT on the host: those the disk lacks are written through."""
        return self._write_through(nodes, Tier.HOST, Tier.DISK)

    def on_match(self, match: Match) -> Load | None:
        """The nodes on the host that continue what the device has of `match`, if there are any.

        Nodes that are LOADING on the device count as being there.
        """
        wanted = []
        for node in match.path:
            if node.state(Tier.DEVICE) is not Residency.ABSENT:
                continue
            if node.state(Tier.HOST) is not Residency.RESIDENT:
                break
            wanted.append(node.node_id)
        return Load(tuple(wanted), Tier.HOST, Tier.DEVICE) if wanted else None

    def on_pressure(self, tier: Tier, n_pages: int) -> list[Drop]:
        """Drops that free `n_pages` pages of `tier`, or all that can be freed if that is less.

        Carried out in order each is legal, provided that nothing else happens in between. The last
        victim is split, so that its leading pages stay if they may.
        """
        victims = self._eviction.victims(tier, n_pages)
        surplus = sum(node.n_pages for node in victims) - n_pages
        if victims and surplus > 0:
            # The lower half stays the same object, so the victim is now the part that must go.
            self._forest.split(victims[-1], surplus)
        return [Drop(node.node_id, tier) for node in victims]

    def _write_through(self, nodes: Iterable[Node], source: Tier, target: Tier) -> list[WriteBack]:
        if not self.is_enabled(target):
            return []
        return [
            WriteBack(node.node_id, source, target)
            for node in nodes
            if node.state(source) is Residency.RESIDENT and node.state(target) is Residency.ABSENT
        ]
