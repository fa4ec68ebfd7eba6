"""What stands in for SGLang's kernels of drafts, against what the words say, on random trees."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")

import torch

from tiered_kv.plugin.upstream import draft_kernels as kernels

N_REQUESTS, N_NODES = 4, 7


def random_parents(dice: random.Random) -> list[list[int]]:
    return [[-1, *(dice.randrange(node) for node in range(1, N_NODES))] for _ in range(N_REQUESTS)]


def ancestors(parents: list[int], node: int) -> list[int]:
    """From `node` to the root, both included."""
    return [node] if parents[node] < 0 else [node, *ancestors(parents, parents[node])]


def masks_of(trees: list[list[int]]) -> torch.Tensor:
    masks = torch.zeros(N_REQUESTS, N_NODES, N_NODES, dtype=torch.bool)
    for mask, parents in zip(masks, trees, strict=True):
        for node in range(N_NODES):
            mask[node, ancestors(parents, node)] = True
    return masks


def reconstructed(trees: list[list[int]], lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    positions = torch.full((N_REQUESTS * N_NODES,), -7)
    outputs = [torch.full((N_REQUESTS, N_NODES), -7) for _ in range(3)]
    kernels.reconstruct_indices_from_tree_mask(
        masks_of(trees).flatten(), lengths, positions, *outputs, N_REQUESTS, N_NODES
    )
    return positions, *outputs


@pytest.mark.parametrize("seed", range(10))
def test_all_about_a_tree(seed: int) -> None:
    dice = random.Random(seed)
    trees = random_parents(dice)
    lengths = torch.tensor([dice.randrange(1, 90) for _ in trees])
    positions, numbers, children, siblings = reconstructed(trees, lengths)
    assert numbers.flatten().tolist() == list(range(N_REQUESTS * N_NODES))
    for request, parents in enumerate(trees):
        for node in range(N_NODES):
            depth = len(ancestors(parents, node)) - 1
            assert positions.view(N_REQUESTS, -1)[request, node] == lengths[request] + depth
            own = [n for n in range(N_NODES) if parents[n] == node]
            later = [n for n in range(node + 1, N_NODES) if node and parents[n] == parents[node]]
            assert children[request, node] == (own[0] if own else -1)
            assert siblings[request, node] == (later[0] if later else -1)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_accepted_is_the_longest_path_that_the_model_would_have_said(seed: int) -> None:
    dice = random.Random(seed)
    trees = random_parents(dice)
    _, numbers, children, siblings = reconstructed(trees, torch.ones(N_REQUESTS))
    longest = dice.choice((N_NODES, 3))
    tokens = torch.tensor([[dice.randrange(3) for _ in range(N_NODES)] for _ in trees])
    said = torch.tensor([[dice.randrange(3) for _ in range(N_NODES)] for _ in trees])
    predicts = torch.zeros(N_REQUESTS * N_NODES, dtype=torch.int32)
    accepted = torch.full((N_REQUESTS, longest), -1, dtype=torch.int32)
    n_accepted = torch.full((N_REQUESTS,), -7, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts, accept_index=accepted, accept_token_num=n_accepted, candidates=tokens,
        retrive_index=numbers, retrive_next_token=children, retrive_next_sibling=siblings,
        target_predict=said,
    )  # fmt: skip
    for request, parents in enumerate(trees):
        path = [0]
        while len(path) < longest:
            wanted = said[request, path[-1]]
            fitting = [
                n for n in range(N_NODES) if parents[n] == path[-1] and tokens[request, n] == wanted
            ]
            if not fitting:
                break
            path.append(fitting[0])
        assert n_accepted[request] == len(path) - 1
        expected = [request * N_NODES + node for node in path]
        assert accepted[request].tolist() == expected + [-1] * (longest - len(path))
        assert predicts[expected].tolist() == said[request, path].tolist()


def test_slots() -> None:
    table = torch.arange(40, dtype=torch.int32).view(4, 10)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([3, 0]), torch.tensor([5, 4])
    slots = torch.full((8,), -7)
    kernels.assign_extend_cache_locs_cpu(rows, table, starts, ends, slots, 10)
    assert slots.tolist() == [23, 24, 0, 1, 2, 3, -7, -7]
    kernels.assign_req_to_token_pool_cpu(rows, table, starts, ends, torch.arange(90, 96), 10)
    assert table[2].tolist() == [20, 21, 22, 90, 91, 25, 26, 27, 28, 29]
    assert table[0].tolist() == [92, 93, 94, 95, 4, 5, 6, 7, 8, 9]
    assert table[1].tolist() == list(range(10, 20))
    drafts = torch.full((7,), -7)
    starts = torch.tensor([1, 4])
    kernels.assign_draft_cache_locs_contiguous_cpu(rows[1:], table, starts[1:], drafts, 10, 1, 3)
    assert drafts.tolist() == [4, 5, 6, -7, -7, -7, -7]
    accepted = torch.zeros(6, dtype=torch.int64)
    nodes = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32)
    kernels.fill_accept_out_cache_loc_cpu(nodes, torch.arange(50, 56), accepted)
    assert accepted.tolist() == [50, 52, 53, 0, 0, 0]


def test_the_token_that_ends_what_was_accepted() -> None:
    accepted = torch.tensor([[5, 6, 7], [8, -1, -1], [9, 3, -1]])
    last = torch.zeros(3, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(accepted, torch.tensor([3, 1, 2]), last, 3)
    assert last.tolist() == [7, 8, 3]


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_of_chosen_candidates(seed: int) -> None:
    """Each step has `breadth` candidates below each of `breadth` parents that the last one kept."""
    dice = random.Random(seed)
    breadth, depth = dice.choice(((1, N_NODES - 1), (2, 4), (3, 3)))
    kept = list(range(breadth))
    parent_list, parent_of = [-1, *kept], dict.fromkeys(kept, -1)
    first = breadth
    for _ in range(depth - 1):
        below = {first + i: parent for i, parent in enumerate(p for p in kept for _ in kept)}
        parent_of |= below
        kept = sorted(dice.sample(sorted(below), breadth))
        parent_list += kept
        first += breadth * breadth
    chosen = {0}
    while len(chosen) < N_NODES - 1:
        chosen.add(dice.choice([c for c, p in parent_of.items() if p in chosen or p == -1]))
    nodes = {candidate: node for node, candidate in enumerate(sorted(chosen), 1)}
    parents = [-1, *(nodes.get(parent_of[c], 0) for c in sorted(chosen))]

    mask = torch.ones(N_NODES * N_NODES, dtype=torch.bool)
    positions = torch.full((N_NODES,), -7)
    outputs = [torch.full((1, N_NODES), -7) for _ in range(3)]
    kernels.build_tree_kernel_efficient_cpu(
        torch.tensor([parent_list]), torch.tensor([sorted(chosen)]), torch.tensor([30]), mask,
        positions, *outputs, breadth, depth, N_NODES, 1,
    )  # fmt: skip
    for node in range(N_NODES):
        path = ancestors(parents, node)
        assert mask.view(N_NODES, N_NODES)[node].nonzero().flatten().tolist() == sorted(path)
        assert positions[node] == 30 + len(path) - 1
    expected = [torch.full((1, N_NODES), -7) for _ in range(3)]
    kernels.reconstruct_indices_from_tree_mask(
        mask, torch.tensor([30]), positions, *expected, 1, N_NODES
    )
    assert all(a.equal(b) for a, b in zip(outputs, expected, strict=True))
