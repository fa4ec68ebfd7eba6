"""What a cascade runner is: it carries out one plan, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tiered_kv.attention.plan import CascadePlan


@dataclass(frozen=True, slots=True)
class PageTables:
    """Where the KV of each request of a decode batch lies in the pool."""

    slots: torch.Tensor
    """[requests of the server, longest context], integers: the slot of each token of each request.

    Slots, not pages: whatever the page size, a page of p tokens is p consecutive slots.
    """

    table_rows: torch.Tensor
    """[batch]: the row of `slots` of each request of the batch."""

    n_tokens: tuple[int, ...]
    """Tokens of each request's context, the newest included, whose slot is in its table."""


class CascadeRunner(Protocol):
    """Attends for decode batches, one query a request, as their plans say."""

    def prepare(self, plan: CascadePlan, tables: PageTables) -> None:
        """Whatever is the same in all layers: once for each forward pass.

        Raises ValueError if the plan is not for a batch of that size, or leaves a row no suffix.
        """
        ...

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """One layer; fills and returns `output`.

        query: [batch, query heads, head size]; keys, values: the layer's pool, [slots, KV heads,
        head size]; output: [batch, query heads, value head size]; scale: of the products of query
        and key. Raises ValueError if the query heads cannot share the KV heads evenly.
        """
        ...
