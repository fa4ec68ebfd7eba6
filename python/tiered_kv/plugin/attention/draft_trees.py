"""Attention of draft trees on a CPU: what speculative decoding has the model verify in one pass.

A node sees all that is before the tree, its ancestors and itself; within a window, if the layer has
one, that goes by its place in the text, not among the tokens of the pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tiered_kv.plugin.attention.scores import Scores, nearest


class DraftTrees:
    """The trees of a pass, n nodes for each request."""

    def __init__(self, n_before: list[int], positions: torch.Tensor, seen: torch.Tensor) -> None:
        """n_before: tokens before each tree. positions [requests, n]: of the nodes in the text.

        seen [requests, n, n], bool: whether node i sees node j.
        """
        self._n_before = n_before
        self._positions = positions
        self._seen = seen
        self._masks = functools.cache(self._new_masks)

    @classmethod
    def of(cls, forward_batch: Any) -> DraftTrees:
        """Those of a SGLang pass in mode TARGET_VERIFY, whose masks have no columns for what is
        before the trees."""
        n_before = forward_batch.seq_lens.tolist()
        n_nodes = forward_batch.spec_info.draft_token_num
        positions = forward_batch.positions.view(-1, n_nodes)
        seen = forward_batch.spec_info.custom_mask.view(-1, n_nodes, n_nodes).bool()
        return cls(n_before, positions, seen)

    def _new_masks(self, window: int | None, chunk: int | None) -> list[torch.Tensor]:
        """For each request [n, tokens before + n]: which keys its nodes see."""
        masks = []
        for n_before, positions, seen in zip(
            self._n_before, self._positions, self._seen, strict=True
        ):
            mask = torch.cat((seen.new_ones(len(seen), n_before), seen), dim=1)
            of_keys = torch.cat((torch.arange(n_before), positions))
            masks.append(mask & (of_keys >= nearest(positions[:, None], window, chunk)))
        return masks

    def attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: list[torch.Tensor],
        *,
        scores: Scores,
        window: int | None,
    ) -> torch.Tensor:
        """Fill and return `output`.

        query, output: [requests * n, query heads, head size]; caches: [slots, KV heads, head size].
        slots: of each request those of its text, and behind them those of its tree.
        """
        begin = 0
        for own_slots, mask in zip(slots, self._masks(window, scores.chunk), strict=True):
            n_nodes, n_keys = mask.shape
            own = slice(begin, begin + n_nodes)
            keys, values = (cache[own_slots[:n_keys]] for cache in (k_cache, v_cache))
            output[own] = scores.attend(query[own], keys, values, mask)
            begin += n_nodes
        return output
