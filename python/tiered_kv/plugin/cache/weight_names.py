"""Under which name KV goes to the cold stores while the weights change.

A name stands for the weights that all of the cached KV was computed with. While there is none, the
stores are left alone. A name is looked for as late as possible, when the next prompt is looked
up: trainers send weights in many parts, each of which is an update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiered_kv.tiers.hierarchy import KVHierarchy
    from tiered_kv.tiers.page_store import PageStore

logger = logging.getLogger(__name__)


class WeightNames:
    """name_weights: names the weights in use now, and opens their namespace in the cold stores.

    Every call is made on every rank, at the same point of its loop. name_weights: None if that
    cannot be had; weights that have changed have no name then.
    """

    def __init__(
        self,
        hierarchy: KVHierarchy,
        name_weights: Callable[[], tuple[bytes, tuple[PageStore, ...]]] | None,
    ) -> None:
        self._hierarchy = hierarchy
        self._name_weights = name_weights
        self.is_named = True
        """Whether what is computed now has a name."""
        # KV of several weights is cached, or will be: no name is right before a flush.
        self._is_mixed = False
        # The weights are not in memory.
        self._are_away = False

    def changing(self, *, is_computing: bool) -> None:
        """Other weights may be in use after this; is_computing: and go on with KV of the old."""
        self._hierarchy.put_stores_away()
        if self._name_weights is None and self.is_named:
            logger.warning(
                "Tiered KV: the weights change, and with DP attention or a pipeline none is found: "
                "nothing is read from disk or store, or written there, until the server restarts."
            )
        self.is_named = False
        self._is_mixed |= is_computing

    def taken_away(self) -> None:
        """The weights leave memory; nothing is computed until they are `back`."""
        self.changing(is_computing=False)
        self._are_away = True

    def back(self) -> None:
        """Weights are in memory again, whichever they are."""
        self._are_away = False

    def look(self) -> None:
        """Finds the name of the weights in use, if what is cached may have one.

        Called before anything is computed with them.
        """
        if self.is_named or self._is_mixed or self._are_away or self._name_weights is None:
            return
        hierarchy = self._hierarchy
        namespace, stores = self._name_weights()
        (is_same,) = hierarchy.context.collective.minimum([int(namespace == hierarchy.namespace)])
        if not is_same and len(hierarchy.context.forest):
            self._is_mixed = True
            logger.warning(
                "Tiered KV: the weights have changed and KV of earlier ones is still cached, which "
                "the update asked for; the disk tier is not used until /flush_cache."
            )
            return
        hierarchy.set_namespace(namespace, stores)
        self.is_named = True
        logger.info(
            "Tiered KV: the weights are %s; what is computed with them has a name again.",
            "as they were" if is_same else "others",
        )

    def emptied(self) -> None:
        """Nothing is cached, and nobody computes."""
        self._is_mixed = False
        self.look()
