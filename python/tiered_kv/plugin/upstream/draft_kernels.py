"""What SGLang asks of its compiled kernels to speculate on a CPU, in plain torch.

Each has the name and the arguments of the operation of `sgl_kernel` in whose place it stands, and
writes into the tensors that it is given. A *draft tree* has n nodes for each request: node 0 is the
token that is certain, children continue their parents, and of siblings that with the lower number
comes first. `retrieve_index` numbers the nodes of all requests; `next_token` has each node's first
child and `next_sibling` the sibling after it, -1 for none.

Source of the contracts: SGLang 0.5.17, `kernels/ops/speculative/` (their Triton versions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def _by_request(*columns: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _parts(
    rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """Of each request: its row, its places in it, and its part of `slots`, one after the other."""
    first = 0
    for row, start, end in _by_request(rows, starts, ends):
        yield row, slice(start, end), slice(first, first + end - start)
        first += end - start


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    pool_len: int,
) -> None:
    """table[row, start:end] of each request becomes its part of `slots`, one after the other."""
    del pool_len
    for row, places, part in _parts(rows, starts, ends):
        table[row, places] = slots[part]


def assign_extend_cache_locs_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    pool_len: int,
) -> None:
    """The other way round: `slots` begins with table[row, start:end] of all requests."""
    del pool_len
    for row, places, part in _parts(rows, starts, ends):
        slots[part] = table[row, places]


def assign_draft_cache_locs_contiguous_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    pool_len: int,
    breadth: int,
    n_steps: int,
) -> None:
    """`slots` begins with the breadth x n_steps places of each request's table behind `starts`."""
    ends = starts + breadth * n_steps
    assign_extend_cache_locs_cpu(rows, table, starts, ends, slots, pool_len)


def fill_bonus_tokens_cpu(
    accepted: torch.Tensor, n_accepted: torch.Tensor, last: torch.Tensor, width: int
) -> None:
    """last [requests]: of each row of `accepted` [requests, width] the token that ends it."""
    last.copy_(accepted.view(-1, width).gather(1, n_accepted[:, None].long() - 1)[:, 0])


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accepted: torch.Tensor
) -> None:
    """`accepted` begins with the slots of all accepted nodes; -1 in `accept_index` is none."""
    nodes = accept_index.flatten()
    nodes = nodes[nodes >= 0].long()
    accepted[: len(nodes)] = out_cache_loc[nodes]


def verify_tree_greedy_cpu(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Walk down each tree as long as there is a child that the model would have said.

    candidates, target_predict: [requests, n], a node's token and the model's behind it.
    accept_index [requests, longest path + 1]: numbers of the nodes walked over.
    accept_token_num [requests]: how many of them, without the first.
    predicts [requests * n]: at each of these nodes the model's token behind it.
    """
    wanted = target_predict.flatten().tolist()
    for request, (tokens, numbers, children, siblings) in enumerate(
        _by_request(candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    ):
        path = [0]
        while len(path) < accept_index.shape[1]:
            node = children[path[-1]]
            while node != -1 and tokens[node] != wanted[numbers[path[-1]]]:
                node = siblings[node]
            if node == -1:
                break
            path.append(node)
        for position, node in enumerate(path):
            accept_index[request, position] = numbers[node]
            predicts[numbers[node]] = wanted[numbers[node]]
        accept_token_num[request] = len(path) - 1


#: What a tree's mask has columns for: the nodes alone (SGLang's TreeMaskMode.QLEN_ONLY).
_NODES_ONLY = 1


def build_tree_kernel_efficient_cpu(  # noqa: PLR0913, PLR0917 - upstream's signature
    parent_list: torch.Tensor,
    chosen: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    breadth: int,
    depth: int,
    n_nodes: int,
    mask_mode: int,
) -> None:
    """All about trees of which is known which candidates of each step were chosen as nodes.

    A step has `breadth` candidates below each of its parents. chosen [requests, n - 1]: numbers of
    those that became nodes 1 to n - 1. parent_list [requests, parents]: what each parent is among
    all candidates; the first is the token that is certain. tree_mask [requests * n * n].
    """
    del depth
    if mask_mode != _NODES_ONLY:
        raise ValueError(f"trees of drafts have no masks of mode {mask_mode} on a CPU")
    trees = []
    for candidates, parents in _by_request(chosen, parent_list):
        nodes = {candidate: node for node, candidate in reversed([*enumerate(candidates, 1)])}
        trees.append([-1])
        for candidate in candidates:
            parent = candidate // breadth
            trees[-1].append(nodes[parents[parent]] if parent else 0)
    masks = tree_mask[: len(trees) * n_nodes**2].view(-1, n_nodes, n_nodes)
    masks.zero_()
    for mask, parent_of in zip(masks, trees, strict=True):
        for node, parent in enumerate(parent_of):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
    positions.copy_((masks.sum(-1) - 1 + seq_lens[:, None]).flatten())
    _link(trees, retrieve_index, next_token, next_sibling)


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    n_requests: int,
    n_nodes: int,
) -> None:
    """All about trees of which is known who descends from whom.

    tree_mask [requests * n * n]: whether node i sees node j; it sees its ancestors and itself.
    """
    masks = tree_mask.view(n_requests, n_nodes, n_nodes).bool().tril(-1)
    positions.copy_((masks.sum(-1) + seq_lens[:, None]).flatten())
    numbers = torch.arange(n_nodes)
    parents = torch.where(masks, numbers, -1).amax(-1)
    _link(parents.tolist(), retrieve_index, next_token, next_sibling)


def _link(
    parents: Sequence[Sequence[int]],
    retrieve_index: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
) -> None:
    n_nodes = retrieve_index.shape[1]
    retrieve_index.copy_(torch.arange(len(parents) * n_nodes).view(-1, n_nodes))
    children = [[-1] * n_nodes for _ in parents]
    siblings = [[-1] * n_nodes for _ in parents]
    for request, parent_of in enumerate(parents):
        for node in range(n_nodes - 1, 0, -1):
            parent = parent_of[node]
            if parent >= 0:
                siblings[request][node] = children[request][parent]
                children[request][parent] = node
    next_token.copy_(torch.tensor(children))
    next_sibling.copy_(torch.tensor(siblings))
