"""Sends a workload's requests when they are due, and follows up what was answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from benchmark.replay.client import Prompt
from benchmark.replay.records import Record
from tiered_kv.simulation.workload.request import Request, Workload


class Sender(Protocol):
    """What sends a request, such as `Client.send`."""

    async def __call__(self, request: Request, prompt: Prompt, start_s: float, /) -> Record:
        """Send and wait for the end of the answer."""
        ...


async def replay(
    workload: Workload,
    send: Sender,
    prompt_of: Callable[[Request], Prompt],
    *,
    in_flight: int = 0,
    done: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Replay `workload`; returns a record per request, by the time of sending.

    Open loop: the workload's initial requests are sent at their times, however slow the server is.
    With `in_flight` > 0 their times are ignored: that many sessions are under way at any time, the
    next starting when one ends. Follow-ups keep their pauses either way; a session whose request
    failed ends there. `done` is told of each record.
    """
    start_s = time.perf_counter()
    records: list[Record] = []
    places = asyncio.Semaphore(in_flight) if in_flight else None

    async def session(request: Request | None) -> None:
        try:
            while request is not None:
                await _sleep_until(start_s + request.arrival_s)
                record = await send(request, prompt_of(request), start_s)
                records.append(record)
                done(record)
                if record.error is not None:
                    return
                request = workload.follow_up(request, time.perf_counter() - start_s)
        finally:
            if places is not None:
                places.release()

    async with asyncio.TaskGroup() as group:
        for request in workload.initial():
            if places is not None:
                await places.acquire()
                # A copy: the workload may hand out the same object the next time.
                request = replace(request, arrival_s=time.perf_counter() - start_s)  # noqa: PLW2901
            else:
                await _sleep_until(start_s + request.arrival_s)
            group.create_task(session(request))
    return sorted(records, key=lambda record: (record.sent_s, record.request_id))


async def _sleep_until(at_s: float) -> None:
    # Also with nothing to wait for, so that a burst of arrivals doesn't keep the loop to itself.
    await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
