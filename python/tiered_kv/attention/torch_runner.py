"""Cascade attention in plain PyTorch: the reference, and what a CPU server uses.

Exact: a softmax over all keys is the merge of softmaxes over parts of them, weighted by their
log-sum-exps (Hydragen, arXiv 2402.05099). Each group gathers its KV from the pool once, or reads it
in place where it lies in consecutive slots. Query heads that share a KV head become rows of one
product, so that KV is not repeated for them either. Rows of about the same length go through the
kernel together, padded: one call for each costs more than reading a short suffix.

Partial results stay in float32 until they are merged (float64 for float64 queries): rounding each
to bfloat16 first made the error up to 1.3 times that of plain attention on random batches. Rows in
no group go through the kernel in their own type, as without cascade.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tiered_kv.attention.plan import CascadePlan, Group
from tiered_kv.attention.runner import PageTables

#: Rows go together if none is longer than the shortest by more than this part of it, and 16 tokens.
PADDING_MAX = 0.125
PADDING_TOKENS = 16

#: Tokens that are gathered for one call, unless a single row has more: they should stay in a cache.
GATHERED_TOKENS_MAX = 8192


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows that go through the kernel in one call."""

    rows: slice | torch.Tensor
    """A slice if they are consecutive: a view costs less than an index."""

    n_batch: int
    """Sets of slots; each is attended to by as many rows, in order."""

    slots: slice | torch.Tensor
    """[batch x tokens], or a slice of the pool."""

    mask: torch.Tensor | None
    """[batch, 1, 1, tokens]: 0, and -inf for padding; None where there is none."""


class TorchCascadeRunner:
    """Implements `CascadeRunner` on any device; with ATen's flash attention kernel on a CPU."""

    def __init__(self) -> None:
        self._plain: list[_Part] = []
        self._suffixes: list[_Part] = []
        self._shared: list[_Part] = []
        self._grouped = torch.empty(0, dtype=torch.long)
        self._n_rows = 0

    def prepare(self, plan: CascadePlan, tables: PageTables) -> None:
        _check(plan, tables)
        shared_tokens = plan.shared_tokens
        grouped = [row for row, shared in enumerate(shared_tokens) if shared]
        place = {row: i for i, row in enumerate(grouped)}
        device = tables.slots.device
        self._n_rows = plan.n_rows
        self._grouped = torch.tensor(grouped, dtype=torch.long, device=device)
        alone = [row for row, shared in enumerate(shared_tokens) if not shared]
        self._plain = _parts_of_rows(alone, alone, shared_tokens, tables)
        self._suffixes = _parts_of_rows(grouped, range(len(grouped)), shared_tokens, tables)
        self._shared = [
            _part_of_group(group, [place[row] for row in group.rows], tables)
            for level in plan.levels
            for group in level.groups
        ]

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        if len(query) != self._n_rows or query.shape[1] % keys.shape[1]:
            raise ValueError(
                f"A query of shape {tuple(query.shape)} does not fit a batch of {self._n_rows} "
                f"rows and {keys.shape[1]} KV heads."
            )
        for part in self._plain:
            output[part.rows] = _attend(query[part.rows], keys, values, part, scale)[0]
        if not self._shared:
            return output
        exact = torch.promote_types(query.dtype, torch.float32)
        grouped_query = query[self._grouped].to(exact)
        merged = grouped_query.new_empty(*grouped_query.shape[:2], values.shape[2])
        merged_lse = grouped_query.new_empty(grouped_query.shape[:2])
        for part in self._suffixes:
            merged[part.rows], merged_lse[part.rows] = _attend(
                grouped_query[part.rows], keys, values, part, scale
            )
        for part in self._shared:
            attended, lse = _attend(grouped_query[part.rows], keys, values, part, scale)
            merged[part.rows], merged_lse[part.rows] = merge(
                merged[part.rows], merged_lse[part.rows], attended, lse
            )
        output[self._grouped] = merged.to(output.dtype)
        return output


def _index(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    if all(b - a == 1 for a, b in itertools.pairwise(rows)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _part_of_group(group: Group, places: list[int], tables: PageTables) -> _Part:
    slots = tables.slots[tables.table_rows[group.leader], group.start : group.end]
    first, last = int(slots[0]), int(slots[-1])
    in_place: slice | torch.Tensor = slots
    if last - first == len(slots) - 1 and bool((slots[1:] - slots[:-1] == 1).all()):
        in_place = slice(first, last + 1)
    return _Part(_index(places, slots.device), 1, in_place, None)


def _parts_of_rows(
    rows: Sequence[int], places: Sequence[int], starts: Sequence[int], tables: PageTables
) -> list[_Part]:
    """Each row's own tokens, those from its start on, in as few calls as the lengths allow.

    rows: of the batch, ascending; places: where they are in the query that the parts are for.
    """
    lengths = {row: tables.n_tokens[row] - starts[row] for row in rows}
    place = dict(zip(rows, places, strict=True))
    parts, together = [], list[int]()
    for row in sorted(rows, key=lambda row: lengths[row]):
        length = lengths[row]
        shortest = lengths[together[0]] if together else length
        is_longer = length > shortest + max(PADDING_MAX * shortest, PADDING_TOKENS)
        if together and (is_longer or (len(together) + 1) * length > GATHERED_TOKENS_MAX):
            parts.append(_padded(sorted(together), place, lengths, starts, tables))
            together = []
        together.append(row)
    if together:
        parts.append(_padded(sorted(together), place, lengths, starts, tables))
    return parts


def _padded(
    rows: list[int],
    place: dict[int, int],
    lengths: dict[int, int],
    starts: Sequence[int],
    tables: PageTables,
) -> _Part:
    """The rows padded to the longest, each with its own last slot: what is there is finite."""
    device = tables.slots.device
    index = _index([place[row] for row in rows], device)
    if len(rows) == 1:
        (row,) = rows
        slots = tables.slots[tables.table_rows[row], starts[row] : tables.n_tokens[row]]
        return _Part(index, 1, slots, None)
    length = torch.tensor([lengths[row] for row in rows], device=device)[:, None]
    start = torch.tensor([starts[row] for row in rows], device=device)[:, None]
    token = torch.arange(max(lengths[row] for row in rows), device=device)[None]
    table_rows = tables.table_rows[torch.tensor(rows, device=device)][:, None]
    slots = tables.slots[table_rows, start + torch.minimum(token, length - 1)]
    is_padding = token >= length
    mask = None
    if bool(is_padding.any()):
        mask = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, -torch.inf)
        mask = mask[:, None, None]
    return _Part(index, len(rows), slots.flatten(), mask)


def merge(
    a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    a, b: [rows, heads, head size]; LSEs, natural: [rows, heads], finite. Returns the same for both.
    """
    lse = torch.logaddexp(a_lse, b_lse)
    # The difference of the two alone says the weights, and cannot overflow.
    weight = torch.sigmoid(b_lse - a_lse)
    return torch.lerp(a, b, weight[..., None]), lse


def unshared_groups(plan: CascadePlan, tables: PageTables) -> list[int]:
    """Numbers, through all levels, of the groups whose rows do not hold the leader's very slots.

    A plan for which there are any must not be run: its rows would read others' KV.
    """
    table_rows = tables.table_rows.tolist()
    groups = [group for level in plan.levels for group in level.groups]
    wrong = []
    for number, group in enumerate(groups):
        held = tables.slots[[table_rows[row] for row in group.rows], group.start : group.end]
        if not torch.equal(held, held[:1].expand_as(held)):
            wrong.append(number)
    return wrong


def _check(plan: CascadePlan, tables: PageTables) -> None:
    if not plan.n_rows == len(tables.n_tokens) == len(tables.table_rows):
        raise ValueError(
            f"A plan for {plan.n_rows} rows does not fit {len(tables.n_tokens)} contexts in "
            f"{len(tables.table_rows)} rows of the page tables."
        )
    for row, (shared, n_tokens) in enumerate(zip(plan.shared_tokens, tables.n_tokens, strict=True)):
        if shared >= n_tokens:
            raise ValueError(
                f"The plan shares {shared} tokens of row {row}, whose context has {n_tokens}; "
                "at least one must be its own."
            )


def _attend(
    query: torch.Tensor,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor,
    part: _Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part's rows attend to its slots. Returns [rows, query heads, head size] and the LSE.

    query: [rows, query heads, head size], whose type everything is computed in.
    """
    n_rows, n_heads, head_dim = query.shape
    n_kv_heads, n_batch = pool_keys.shape[1], part.n_batch
    n_sharing, rows_each = n_heads // n_kv_heads, n_rows // n_batch
    # [batch x rows, KV heads x sharing, size] -> [batch, KV heads, rows x sharing, size]
    folded = query.reshape(n_batch, rows_each, n_kv_heads, n_sharing, head_dim).transpose(1, 2)
    folded = folded.reshape(n_batch, n_kv_heads, rows_each * n_sharing, head_dim)

    def gather(pool: torch.Tensor) -> torch.Tensor:
        slots = part.slots
        found = pool[slots] if isinstance(slots, slice) else pool.index_select(0, slots)
        by_batch = found.to(query.dtype).view(n_batch, -1, n_kv_heads, pool.shape[2])
        return by_batch.transpose(1, 2)

    mask = part.mask
    if mask is not None:
        mask = mask.to(query.dtype).expand(-1, n_kv_heads, folded.shape[2], -1)
    attended, lse = _kernel(folded, gather(pool_keys), gather(pool_values), scale, mask)

    def unfold(folded: torch.Tensor) -> torch.Tensor:
        by_row = folded.reshape(n_batch, n_kv_heads, rows_each, n_sharing, -1).transpose(1, 2)
        return by_row.reshape(n_rows, n_heads, -1)

    return unfold(attended), unfold(lse)[..., 0]


def _kernel(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and its natural LSE.

    query: [batch, heads, queries, size], keys: [batch, heads, tokens, size], values: [batch, heads,
    tokens, value size]; mask: [batch, heads, queries, tokens], additive, some token of each query
    unmasked. At least one token: ATen's kernel divides by zero, and kills the process, without.
    """
    if query.device.type == "cpu" and keys.shape[3] == values.shape[3]:
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
        return attended, lse
    return attend_by_products(query, keys, values, scale, mask)


def attend_by_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by two matrix products, in float32 or better between them."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(exact) @ keys.to(exact).transpose(2, 3)) * scale
    if mask is not None:
        scores += mask.to(exact)
    lse = torch.logsumexp(scores, dim=-1)
    attended = torch.exp(scores - lse[..., None]) @ values.to(exact)
    return attended.to(query.dtype), lse
