"""A running request makes way for others, and keeps its KV: it comes back without recompute.

Its whole pages join the prefix cache, which has written most of them to the host by then
(FastSwitch, arXiv 2411.18424, reuses such copies likewise), and are evicted like any other when
their room is needed. The request waits with everyone else, and finds them again on the device, on
the host or on the disk; only what fills no page is computed again. SGLang's own retraction throws
all of it away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.queue.again import Why, has_room, queue_again
from tiered_kv.plugin.requests.view import is_named
from tiered_kv.plugin.upstream.current import request_kv
from tiered_kv.scheduler.iteration_swap import SWAPS_MAX

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

_N_SWAPS = "tiered_kv_n_swaps"


def keep_kv(req: Req, tree_cache: Any) -> None:
    """Gives up everything on the device that `req` holds; its whole pages become cache."""
    if is_named(req):
        request_kv.keep(req, tree_cache)
    else:
        request_kv.give_back(req, tree_cache)


def release_req(original: Callable[..., None], **kwargs: Any) -> None:
    """AROUND SGLang's function `release_req`, for requests that are retracted or preempted.

    Not where KV is to be forgotten: `retract_all`, which alone says `offload_kv`, empties the
    server for an update of the weights.
    """
    tree_cache = kwargs["tree_cache"]
    if "offload_kv" in kwargs or not getattr(tree_cache, "resumes_requests", False):
        original(**kwargs)
        return
    req = kwargs["req"]
    keep_kv(req, tree_cache)
    req.reset_for_retract()


def release_row(
    original: Callable[..., bool], batch: ScheduleBatch, idx: int, *args: Any, **kwargs: Any
) -> bool:
    """AROUND `ScheduleBatch.release_req`, where that is for requests that are retracted alone.

    Whether `req` can be resumed.
    """
    if not getattr(batch.tree_cache, "resumes_requests", False):
        return original(batch, idx, *args, **kwargs)
    req = batch.reqs[idx]
    keep_kv(req, batch.tree_cache)
    req.reset_for_retract()
    return True


def can_swap(req: Req) -> bool:
    """Whether `req` could wait again, and go on later as if nothing had happened.

    Log-probabilities and hidden states are collected pass by pass, and would be lost.
    """
    return (
        not req.return_logprob
        and not req.return_hidden_states
        and req.multimodal_inputs is None
        and req.session is None
        and is_named(req)
        and getattr(req, _N_SWAPS, 0) < SWAPS_MAX
    )


class Leaving:
    """Those on their way from the running batch to the queue.

    Under overlap a request's last result may still be to come. Until it is there the request
    belongs to nobody: it decodes no more, and does not wait yet.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._reqs: list[Req] = []
        self.n_swapped = 0

    def __bool__(self) -> bool:
        return bool(self._reqs)

    def __contains__(self, req: Req) -> bool:
        return req in self._reqs

    def add(self, reqs: Iterable[Req]) -> None:
        """They are to leave."""
        self._reqs += [req for req in reqs if req not in self._reqs]

    def clear(self) -> None:
        """Nobody runs any more: nobody is on their way."""
        self._reqs.clear()

    def settle(self, batch: ScheduleBatch) -> None:
        """Those who can leave `batch`, the running batch, do. Who is to end stays, to do so."""
        if not self._reqs:
            return
        there = set(batch.reqs)
        self._reqs = [
            req
            for req in self._reqs
            if req in there and not req.finished() and req.to_finish is None
        ]
        in_flight = self._in_flight()
        ready = [req for req in self._reqs if req not in in_flight]
        if not ready:
            return
        if not has_room(self._scheduler):
            self._reqs.clear()
            return
        self._reqs = [req for req in self._reqs if req in in_flight]
        gone = set(ready)
        keep = [row for row, req in enumerate(batch.reqs) if req not in gone]
        batch.filter_batch(keep_indices=keep)
        batch.batch_is_full = False
        for req in ready:
            self._wait_again(req)

    def _in_flight(self) -> set[Req]:
        """Those of whom a result is still to come."""
        if not self._scheduler.enable_overlap:
            return set()
        return {req for batch, _ in self._scheduler.result_queue for req in batch.reqs}

    def _wait_again(self, req: Req) -> None:
        keep_kv(req, self._scheduler.tree_cache)
        setattr(req, _N_SWAPS, getattr(req, _N_SWAPS, 0) + 1)
        self.n_swapped += 1
        queue_again(self._scheduler, req, Why.SWAPPED)
