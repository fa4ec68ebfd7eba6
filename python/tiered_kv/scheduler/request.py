"""What a scheduling policy sees of one request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from tiered_kv.api.slo import NO_SLO, Slo
from tiered_kv.forest.node import Node, Tokens


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request, from its arrival to its last token. Compared and hashed by identity.

    Policies read it; `WaitingQueue` and whoever runs the requests write it.
    """

    request_id: int
    arrival_s: float
    """When the client sent it; a retraction does not change it."""
    root: Node
    """The tree in which its prefix is looked up."""
    tokens: Tokens
    """Its prompt, in the forest's units (see `WaitingQueue.tokens_per_unit`)."""
    prompt_tokens: int
    max_new_tokens: int
    """The client's limit: the number of tokens it will really produce is not known."""
    slo: Slo = NO_SLO
    priority: int = 0
    """Larger is more important."""
    tenant: str = ""
    """On whose behalf; tenants get the same."""
    expected_output_tokens: int | None = None
    """What the caller says about the length of the answer (`api.hints`)."""
    program: str = ""
    """The program that it is a call of (`program_names.py`); "": of none that is known."""
    parent_program: str = ""
    """The one that started that."""
    branches: int = 1
    """How many calls its parent program makes at once, this one included."""
    is_last_call: bool = False
    """Whether the caller says that it is the program's last."""
    tool: str = ""
    """The tool whose result it brings, as the caller calls it; "": not known."""

    # -- while it waits -----------------------------------------------------------------------
    queued_s: float = 0.0
    """When it last joined the queue."""
    device_tokens: int = 0
    """Leading prompt tokens whose KV the device has."""
    device_units: int = 0
    """The same in the forest's units, whole pages."""
    host_tokens: int = 0
    """Tokens after those that the host has."""
    path: tuple[Node, ...] = ()
    """Nodes that its cached prefix goes through to their ends, top down."""
    inside: Node | None = None
    """The node below those in which its cached prefix ends, if it ends inside one. If that was
    split since, the lower part."""
    processed_at_arrival: int = 0
    """Prefill tokens that the server had computed in all when the request joined the queue."""

    # -- while it runs ------------------------------------------------------------------------
    admitted_s: float | None = None
    """When it was admitted for the first time."""
    prefilled_tokens: int = 0
    """Leading tokens of prompt (and earlier output, after a retraction) with KV on the device."""
    output_tokens: int = 0
    """Tokens produced so far."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    n_retractions: int = 0

    @property
    def cached_tokens(self) -> int:
        """Leading tokens that need not be computed: on the device, or a load away on the host."""
        return self.device_tokens + self.host_tokens

    @property
    def uncached_tokens(self) -> int:
        """Tokens to compute before the next token can be sampled; at least 1."""
        return max(1, self.prompt_tokens + self.output_tokens - self.cached_tokens)

    @property
    def deadline_s(self) -> float:
        """When the first token is due; infinity without a TTFT objective."""
        ttft_s = self.slo.ttft_s
        return math.inf if ttft_s is None else self.arrival_s + ttft_s

    @property
    def next_token_deadline_s(self) -> float:
        """When the next token is due: token i at TTFT + i * TBT after the arrival (Niyama)."""
        if not self.output_tokens:
            return self.deadline_s
        tbt_s = self.slo.tbt_s
        if tbt_s is None:
            return math.inf
        start_s = self.deadline_s
        if math.isinf(start_s):
            start_s = self.first_token_s if self.first_token_s is not None else self.arrival_s
        return start_s + self.output_tokens * tbt_s

    @property
    def unprefilled_tokens(self) -> int:
        """Of prompt and earlier output, those whose KV the device lacks, once it was begun."""
        return self.prompt_tokens + self.output_tokens - self.prefilled_tokens

    @property
    def device_path(self) -> Iterator[Node]:
        """The nodes of its prefix that the device has whole, top down."""
        return takewhile(lambda node: node.end <= self.device_units, self.path)

    @property
    def last_device_node(self) -> Node:
        """The deepest node of its prefix that the device has; the root if there is none."""
        *_, last = (self.root, *self.device_path)
        return last
