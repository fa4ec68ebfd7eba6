"""Random decode batches for cascade attention, and the truth about them in float64.

Trees of shared segments are laid out in pages all over a pool; every row has a suffix of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from tiered_kv.attention.flashinfer_runner import KernelShape
from tiered_kv.attention.grouping import Context, GroupingCosts, best_plans
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.attention.runner import PageTables


@dataclass
class Batch:
    contexts: list[Context]
    tables: PageTables
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float

    def plan(self, max_levels: int) -> CascadePlan:
        return best_plans(self.contexts, GroupingCosts(), max_levels)[-1]

    def kernel_shape(self) -> KernelShape:
        return KernelShape(
            n_query_heads=self.query.shape[1],
            n_kv_heads=self.keys.shape[1],
            head_dim=self.query.shape[2],
            query_dtype=self.query.dtype,
            kv_dtype=self.keys.dtype,
        )

    def slots_of(self, row: int) -> torch.Tensor:
        return self.tables.slots[self.tables.table_rows[row], : self.tables.n_tokens[row]].long()


def draw_paths(rng: random.Random, page_size: int) -> list[tuple[tuple[int, int], ...]]:
    """A path for each row, on a tree whose segments are whole pages."""
    paths: list[tuple[tuple[int, int], ...]] = [()]
    for segment in range(rng.randint(1, 6)):
        parent = rng.choice(paths)
        paths.append((*parent, (segment, page_size * rng.randint(1, max(120 // page_size, 1)))))
    return rng.choices(paths, k=rng.randint(1, 12))


def draw_batch(rng: random.Random, dtype: torch.dtype, value_dim: int | None = None) -> Batch:
    page_size = rng.choice([1, 4, 16, 64])
    n_kv_heads, n_sharing = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 4, 7])
    head_dim = rng.choice([16, 64, 80, 128])
    paths = draw_paths(rng, page_size)
    own = [rng.choice([1, rng.randint(1, 9), rng.randint(1, 150)]) for _ in paths]
    contexts = [
        Context(sum(n for _, n in path) + n_own, path)
        for path, n_own in zip(paths, own, strict=True)
    ]
    n_shared = sum(dict(segment for path in paths for segment in path).values())
    n_pages = 1 + n_shared // page_size + sum(-(-n // page_size) for n in own)
    free_pages = list(range(1, n_pages))
    rng.shuffle(free_pages)

    def allocate(n_tokens: int) -> list[int]:
        pages = [free_pages.pop() for _ in range(-(-n_tokens // page_size))]
        return [page * page_size + i for page in pages for i in range(page_size)][:n_tokens]

    longest = max(context.n_tokens for context in contexts)
    table_rows = rng.sample(range(20), k=len(contexts))
    slots = torch.zeros(20, longest + 5, dtype=torch.int32)
    segments: dict[int, list[int]] = {}
    for context, table_row, n_own in zip(contexts, table_rows, own, strict=True):
        row: list[int] = []
        for segment, n_tokens in context.path:
            if segment not in segments:
                segments[segment] = allocate(n_tokens)
            row += segments[segment]
        row += allocate(n_own)
        slots[table_row, : len(row)] = torch.tensor(row)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Batch(
        contexts,
        PageTables(slots, torch.tensor(table_rows), tuple(c.n_tokens for c in contexts)),
        normal(len(contexts), n_kv_heads * n_sharing, head_dim) * rng.choice([1, 3]),
        normal(n_pages * page_size, n_kv_heads, head_dim),
        normal(n_pages * page_size, n_kv_heads, value_dim or head_dim),
        head_dim**-0.5,
    )


def in_float64(batch: Batch) -> torch.Tensor:
    n_sharing = batch.query.shape[1] // batch.keys.shape[1]
    rows = []
    for row, query in enumerate(batch.query.double()):
        slots = batch.slots_of(row)
        keys = batch.keys[slots].double().repeat_interleave(n_sharing, 1)
        values = batch.values[slots].double().repeat_interleave(n_sharing, 1)
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, keys) * batch.scale, -1)
        rows.append(torch.einsum("ht,thd->hd", weights, values))
    return torch.stack(rows)


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    return float((output.double() - exact).norm() / exact.norm())


def worst_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of any element, relative to the largest value."""
    return float((output.double() - exact).abs().max() / exact.abs().max())
