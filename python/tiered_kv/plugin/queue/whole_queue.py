"""SGLang's own helpers see everyone who waits, though only some are offered.

While a prefill batch is formed the queue is cut to what a plan offers (`order.py`). But who looks
for adapters that starve, or delays prefills until the queue is long, has to see all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def show_whole_queue(scheduler: Any, everyone: Callable[[], list[Any] | None]) -> None:
    """everyone: those who wait, while the queue is cut; None while it is whole."""
    drainer, delayer = scheduler.lora_drainer, scheduler.prefill_delayer
    if drainer is not None:
        update = drainer.update_draining_state

        def update_draining_state(waiting_queue: list[Any], running_reqs: list[Any]) -> None:
            whole = everyone()
            update(waiting_queue if whole is None else whole, running_reqs)

        drainer.update_draining_state = update_draining_state
    if delayer is not None:
        negotiate = delayer._negotiate_should_allow_prefill

        def negotiate_should_allow_prefill(**kwargs: Any) -> Any:
            whole = everyone()
            if whole is not None:
                kwargs["waiting_queue_len"] = len(whole)
            return negotiate(**kwargs)

        delayer._negotiate_should_allow_prefill = negotiate_should_allow_prefill
