"""Attention on a CPU whose scores are not plain: with sinks, with a soft cap, or in chunks.

A sink is a score that each head has beside those of the keys: the softmax counts it, and no value
comes of it (GPT-OSS). A soft cap keeps scores between two numbers (Gemma 2, Grok). Chunks divide a
text, and a token sees its own only (Llama 4). SGLang's `torch_native` has none of that: it refuses
sinks and passes over the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from tiered_kv.plugin.upstream.cpu_kernels import cap_logits

#: Queries of one step, whose scores are 4 bytes for each head, query and key.
BLOCK_QUERIES = 128


@dataclass(frozen=True)
class Scores:
    """How a layer comes from products to weights.

    scaling: of products, one by the root of the head's size if None. cap: 0 for none. sinks:
    [query heads], or None. chunk: tokens of a chunk, or None for none.
    """

    scaling: float | None = None
    cap: float = 0.0
    sinks: torch.Tensor | None = None
    chunk: int | None = None

    @property
    def are_plain(self) -> bool:
        """Whether torch's own kernel computes it, with masks that a window needs at most."""
        return self._is_dot_product and self.chunk is None

    @property
    def _is_dot_product(self) -> bool:
        return self.sinks is None and not self.cap > 0

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """The attention of one sequence, [queries, query heads, value size].

        query: [queries, query heads, size]; keys, values: [keys, KV heads, size] in any type.
        seen: [queries, keys], bool, which keys each query sees.
        """
        # Both ways take [heads, tokens, size].
        query = query.movedim(0, 1)
        keys = keys.to(query.dtype).movedim(0, 1)
        values = values.to(query.dtype).movedim(0, 1)
        if self._is_dot_product:
            attended = scaled_dot_product_attention(
                query[None],
                keys[None],
                values[None],
                attn_mask=seen,
                scale=self.scaling,
                enable_gqa=len(keys) != len(query),
            )[0]
        else:
            attended = self._written_out(query, keys, values, seen)
        return attended.movedim(1, 0)

    def _written_out(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        n_heads, n_queries, size = query.shape
        scaling = size**-0.5 if self.scaling is None else self.scaling
        # The queries of all heads that share keys, one below the other.
        shared = query.reshape(len(keys), -1, size)
        scores = (shared @ keys.mT).float().view(n_heads, n_queries, -1) * scaling
        if self.cap > 0:
            scores = cap_logits(scores, self.cap)
        scores = scores.masked_fill_(~seen, float("-inf"))
        if self.sinks is not None:
            own = self.sinks.float()[:, None, None].expand(-1, n_queries, 1)
            scores = torch.cat((scores, own), dim=2)
        weights = scores.softmax(dim=2)[..., : len(seen[0])].to(values.dtype)
        attended = weights.view(len(keys), -1, len(seen[0])) @ values
        return attended.view(n_heads, n_queries, -1)

    def attend_causally(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """`attend` of a sequence's last `len(query)` tokens, each of which sees those up to itself.

        window: how many tokens before itself it sees; all if None.
        """
        n_new, n_keys = len(query), len(keys)
        of_queries = torch.arange(n_keys - n_new, n_keys)[:, None]
        rows = []
        for begin in range(0, n_new, BLOCK_QUERIES):
            own = of_queries[begin : begin + BLOCK_QUERIES]
            # Not less for a later query than for one before it.
            firsts = nearest(own, window, self.chunk)
            first = int(firsts[0])
            of_keys = torch.arange(first, int(own[-1]) + 1)
            seen = (of_keys <= own) & (of_keys >= firsts)
            near = slice(first, first + len(of_keys))
            rows.append(
                self.attend(query[begin : begin + len(own)], keys[near], values[near], seen)
            )
        return torch.cat(rows)


def nearest(places: torch.Tensor, window: int | None, chunk: int | None) -> torch.Tensor:
    """The first key that a query at each of `places` sees, in the shape of these."""
    first = torch.zeros_like(places)
    if window is not None:
        first = torch.maximum(first, places - window)
    if chunk is not None:
        first = torch.maximum(first, places // chunk * chunk)
    return first
