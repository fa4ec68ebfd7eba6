"""Cascade attention in plain PyTorch: the reference, and what a CPU server can use.

Exact: a softmax over all keys is the merge of softmaxes over parts of them, weighted by their
log-sum-exps (Hydragen, arXiv 2402.05099). Each group gathers its KV from the pool once. Query heads
that share a KV head become rows of one product, so that KV is not repeated for them either.

Partial results stay in float32 until they are merged (float64 for float64 queries): rounding each
to bfloat16 first made the error up to 1.3 times that of plain attention on random batches. Rows in
no group go through the kernel in their own type, as without cascade.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiered_kv.attention.plan import CascadePlan
from tiered_kv.attention.runner import PageTables


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows that attend to the same slots."""

    rows: slice | torch.Tensor
    """A slice if they are consecutive: a view costs less than an index."""

    slots: torch.Tensor


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
        table_rows = tables.table_rows.tolist()

        def part(rows: list[int], leader: int, start: int, end: int) -> _Part:
            slots = tables.slots[table_rows[leader], start:end]
            if rows[-1] - rows[0] == len(rows) - 1:
                return _Part(slice(rows[0], rows[-1] + 1), slots)
            return _Part(torch.tensor(rows, device=device), slots)

        self._n_rows = plan.n_rows
        self._grouped = torch.tensor(grouped, dtype=torch.long, device=device)
        self._plain, self._suffixes = [], []
        for row, (shared, n_tokens) in enumerate(zip(shared_tokens, tables.n_tokens, strict=True)):
            if shared:
                self._suffixes.append(part([place[row]], row, shared, n_tokens))
            else:
                self._plain.append(part([row], row, 0, n_tokens))
        self._shared = [
            part([place[row] for row in group.rows], group.leader, group.start, group.end)
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
            output[part.rows] = _attend(query[part.rows], keys, values, part.slots, scale)[0]
        if not self._shared:
            return output
        exact = torch.promote_types(query.dtype, torch.float32)
        grouped_query = query[self._grouped].to(exact)
        merged = grouped_query.new_empty(*grouped_query.shape[:2], values.shape[2])
        merged_lse = grouped_query.new_empty(grouped_query.shape[:2])
        for part in self._suffixes:
            merged[part.rows], merged_lse[part.rows] = _attend(
                grouped_query[part.rows], keys, values, part.slots, scale
            )
        for part in self._shared:
            attended, lse = _attend(grouped_query[part.rows], keys, values, part.slots, scale)
            merged[part.rows], merged_lse[part.rows] = merge(
                merged[part.rows], merged_lse[part.rows], attended, lse
            )
        output[self._grouped] = merged.to(output.dtype)
        return output


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
    slots: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows attend to all `slots`. Returns [rows, query heads, head size] and the LSE.

    query: [rows, query heads, head size], whose type everything is computed in.
    """
    n_rows, n_heads, head_dim = query.shape
    n_kv_heads = pool_keys.shape[1]
    n_sharing = n_heads // n_kv_heads
    # [rows, KV heads x sharing, size] -> [KV heads, rows x sharing, size]; [KV heads, tokens, size]
    folded = query.reshape(n_rows, n_kv_heads, n_sharing, head_dim).transpose(0, 1)
    folded = folded.reshape(n_kv_heads, n_rows * n_sharing, head_dim)
    keys = pool_keys.index_select(0, slots).to(query.dtype).transpose(0, 1)
    values = pool_values.index_select(0, slots).to(query.dtype).transpose(0, 1)
    attended, lse = _kernel(folded, keys, values, scale)

    def unfold(folded: torch.Tensor) -> torch.Tensor:
        by_row = folded.reshape(n_kv_heads, n_rows, n_sharing, -1).transpose(0, 1)
        return by_row.reshape(n_rows, n_heads, -1)

    return unfold(attended), unfold(lse)[..., 0]


def _kernel(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask, and its natural LSE.

    query: [heads, queries, size], keys: [heads, tokens, size], values: [heads, tokens, value size],
    at least one token: ATen's kernel divides by zero, and kills the process, where there is none.
    """
    if query.device.type == "cpu" and keys.shape[2] == values.shape[2]:
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], keys[None], values[None], 0.0, False, scale=scale
        )
        return attended[0], lse[0]
    return attend_by_products(query, keys, values, scale)


def attend_by_products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by two matrix products, in float32 or better between them."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(exact) @ keys.to(exact).transpose(1, 2)) * scale
    lse = torch.logsumexp(scores, dim=-1)
    attended = torch.exp(scores - lse[..., None]) @ values.to(exact)
    return attended.to(query.dtype), lse
