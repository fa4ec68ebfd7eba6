"""Requests, and the interface through which simulator and replay take them from a workload."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Request:
    """One call to the model."""

    request_id: int
    """Unique in its workload."""

    arrival_s: float
    """Seconds after the workload's start at which the request is sent."""

    blocks: array[int]
    """Ids of the prompt's blocks, in order: equal leading ids are the same tokens, so reusable KV.

    Their number is `input_tokens / block_tokens` rounded down or up: a last block that is only
    partly filled may be there, but can't be shared (see `whole_blocks`).
    """

    input_tokens: int
    """Tokens of the prompt."""

    output_tokens: int
    """Tokens that the model will generate."""

    session: int | None
    """The conversation or agent that the request is part of; None if it stands alone."""

    slo_class: str
    """Name of its service class."""

    ttft_slo_s: float | None
    """Longest acceptable time to the first token, seconds; None for no target."""

    tbt_slo_s: float | None
    """Longest acceptable time between tokens, seconds; None for no target."""

    task_slo_s: float | None = None
    """Longest acceptable time from the session's first call to its last answer; None for none."""

    priority: int = 0
    """A larger one is more urgent, as in SGLang."""

    output_blocks: array[int] = field(default_factory=lambda: array("q"))
    """Ids of the blocks that follow the prompt's whole blocks once the output is there.

    The first holds the prompt's partly filled last block. Empty if nobody will ask for them.
    """

    next_use_hint_s: float | None = None
    """Expected seconds from the finish to the session's next call; None if unknown or the last.

    What an agent framework that knows its workflow could tell a server (KVFlow, NeurIPS 2025).
    """

    ending: str = ""
    """How the answer ends, as its last tokens tell: with a call of a tool, or of a turn; "": the
    same for all."""


class Workload(Protocol):
    """Requests that arrive by themselves, and those that follow from finished ones."""

    name: str
    """What to call it in a report."""

    block_tokens: int
    """Tokens per block of `Request.blocks`."""

    def initial(self) -> Iterator[Request]:
        """Requests whose arrival depends on no answer, by `arrival_s`. Each call starts anew."""
        ...

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """The request that is sent because `finished` was answered, at `finish_s` at the soonest.

        None if its session ends there. To be called once per finished request; what it returns
        does not depend on the order in which different sessions finish.
        """
        ...


class RecordedWorkload:
    """Requests at fixed times, whatever the answers: an open loop."""

    def __init__(self, name: str, block_tokens: int, requests: Iterable[Request]) -> None:
        """Takes `requests` in any order and sorts them by arrival."""
        self.name = name
        self.block_tokens = block_tokens
        self.requests = sorted(requests, key=lambda request: request.arrival_s)

    def __len__(self) -> int:
        return len(self.requests)

    def initial(self) -> Iterator[Request]:
        """All requests, by arrival."""
        return iter(self.requests)

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:  # noqa: ARG002
        """None: nothing depends on an answer."""
        return None


def whole_blocks(request: Request, block_tokens: int) -> array[int]:
    """The ids of those of the prompt's blocks that are full, and thus can be shared."""
    return request.blocks[: request.input_tokens // block_tokens]
