"""A prefill server: it computes prompts, and has their KV sent to servers that decode.

SGLang (disaggregation/prefill.py) keeps a request in a queue of its own until a decode server has
room for it, then in the waiting queue, and once its prompt is computed in a third queue, with its
KV, until that has arrived. The order is told of it when it joins the waiting queue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.cache.idle import cache_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

NOT_LOADED = (
    "KV that this prompt goes on from could not be copied to the device, and a part of it was sent "
    "to the decode server already; send the request again."
)


def is_prefill_server(scheduler: Any) -> bool:
    from sglang.srt.disaggregation.utils import DisaggregationMode

    return bool(scheduler.disaggregation_mode is DisaggregationMode.PREFILL)


def joined(result: list[Req], bootstrap_queue: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `PrefillBootstrapQueue.pop_bootstrapped`: these join the waiting queue now."""
    order = getattr(bootstrap_queue.scheduler, "tiered_kv_order", None)
    if order is not None:
        for req in result:
            order.queue.arrived(req)


def wait_again(scheduler: Any, req: Req) -> None:
    """`req` waits again. A decode server has room for it already, so not as if it were new."""
    scheduler._prefetch_kvcache(req)
    scheduler.waiting_queue.append(req)
    order = getattr(scheduler, "tiered_kv_order", None)
    if order is not None:
        order.queue.arrived(req)


def is_partly_sent(scheduler: Any, req: Req) -> bool:
    """Whether KV of `req`, which is in a pass, may have been sent in passes before.

    Then its slots may still be read, and no part can be sent again: it cannot be computed anew.
    """
    return is_prefill_server(scheduler) and req.extend_batch_idx > 1


def end_unsent(scheduler: Any, req: Req, n_results: int) -> None:
    """Ends `req`, which holds no KV any more, with an error, here and where it was to decode.

    n_results: of its passes, that are still to be processed.
    """
    from sglang.srt.disaggregation.prefill import maybe_release_metadata_buffer
    from sglang.srt.disaggregation.utils import prepare_abort

    req.disagg_kv_sender.abort()
    maybe_release_metadata_buffer(req, scheduler.req_to_metadata_buffer_idx_allocator)
    prepare_abort(req, NOT_LOADED, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
    req.inflight_middle_chunks = n_results
    scheduler.output_streamer.stream_output([req], req.return_logprob)


def process_result(
    original: Callable[..., None], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND `Scheduler.process_batch_result_disagg_prefill`, which wants a token for everyone.

    Those whose KV could not be loaded have left their batch (`failed_loads.py`).
    """
    if batch.reqs:
        original(scheduler, batch, *args, **kwargs)


def send_cached_prefix(
    original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND `Scheduler.maybe_send_cached_prefix_chunk`: what is cached, before the pass is run.

    What is on its way from the host is on the device for whoever is admitted after it, and would be
    sent as it is. SGLang's own releases know of it from 0.5.23 on.
    """
    cache = cache_of(scheduler)
    if cache is None or not cache.pass_awaits_loads:
        original(scheduler, *args, **kwargs)


class _Over(Exception):  # noqa: N818 - no error: the way out of a loop that has none
    """The server shuts down."""


def end_loop(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.handle_shutdown`: 0.5.17's loop of a prefill server does not look."""
    if cache_of(scheduler) is not None and is_prefill_server(scheduler):
        raise _Over


def run_loop(original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND `Scheduler.run_event_loop`."""
    with contextlib.suppress(_Over):
        original(scheduler, *args, **kwargs)
