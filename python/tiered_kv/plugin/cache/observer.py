"""What the cache sees of requests, for whoever keeps the waiting queue in order.

SGLang tells its cache of a request's first token, of its end, and of each scheduling pass, and
nobody else; so the cache passes that on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tiered_kv.forest.node import Node

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class RequestObserver(Protocol):
    """Called on the scheduler's thread, in the order in which things happen."""

    def first_token(self, req: Req) -> None:
        """`req` has a token, and goes on."""

    def released(self, req: Req, last: Node) -> None:
        """`req` holds no KV any more: it is finished, was aborted, or will wait again.

        What it computed is in the tree down to `last`; a root if it is not.
        """

    def polled(self) -> None:
        """A scheduling pass begins, idle or not, and transfers were acknowledged."""

    def emptied(self) -> None:
        """Nothing is cached on the device and the host any more."""

    def before_mixing(self) -> None:
        """A prefill has its memory; decodes are mixed in next, if at all."""

    def wait_over_bound_s(self) -> float:
        """By how much somebody's wait is beyond its bound, at most; 0 if nobody's is."""


class NoObserver:
    """SGLang's own order rules the queue: nobody wants to know."""

    def first_token(self, req: Req) -> None:
        pass

    def released(self, req: Req, last: Node) -> None:
        pass

    def polled(self) -> None:
        pass

    def emptied(self) -> None:
        pass

    def before_mixing(self) -> None:
        pass

    def wait_over_bound_s(self) -> float:
        return 0.0
