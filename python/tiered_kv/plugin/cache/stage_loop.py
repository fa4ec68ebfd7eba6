"""The loop of one stage of a pipeline: its passes counted, and its end.

SGLang's loop of a pipeline (managers/scheduler_pp_mixin.py) does not look whether the server shuts
down: it would be killed, with pages still on their way to the disk. A stage leaves when it has told
the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from tiered_kv.plugin.cache.idle import cache_of
from tiered_kv.tiers.transfer import Meeting


class _Over(Exception):  # noqa: N818 - no error: the way out of a loop that has none
    """The server shuts down."""


def _meeting_of(scheduler: Any) -> Meeting | None:
    """Where the stages of `scheduler` agree; None if it is no stage of a pipeline."""
    cache = cache_of(scheduler)
    return None if cache is None else cache.hierarchy.context.stages


def begin_pass(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `Scheduler.get_next_batch_to_run`, once in each pass of the loop."""
    if (meeting := _meeting_of(scheduler)) is not None:
        meeting.n_pass += 1


def end_last_stage(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.handle_shutdown`: there is nobody to be told."""
    if _meeting_of(scheduler) is not None and scheduler.pp_group.is_last_rank:
        raise _Over


def end_stage(scheduler: Any, data: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `Scheduler._pp_send_pyobj_to_next_stage`, once what was sent before has arrived."""
    from sglang.srt.managers.io_struct import ShutdownReq

    if not scheduler.gracefully_exit or _meeting_of(scheduler) is None:
        return
    if not any(isinstance(item, ShutdownReq) for item in data):
        raise _Over


def run_loop(original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND `Scheduler.run_event_loop`."""
    with contextlib.suppress(_Over):
        original(scheduler, *args, **kwargs)
