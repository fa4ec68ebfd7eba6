"""One source, any number of browsers: it is asked while somebody looks, once for all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, TypeAlias

from tiered_kv.view.frames import Frame, Frames
from tiered_kv.view.recording import Line, Recorder
from tiered_kv.view.source import NoSnapshotError, Source

_Queue: TypeAlias = "asyncio.Queue[Frame | None]"


class Hub:
    """recorder: gets all that is seen; then the source is asked whether or not anybody looks."""

    def __init__(self, source: Source, recorder: Recorder | None = None) -> None:
        self.frames = Frames()
        self._source = source
        self._recorder = recorder
        self._viewers: set[_Queue] = set()
        self._asking: asyncio.Task[None] | None = None

    @property
    def about(self) -> dict[str, Any]:
        return self._source.about

    def start(self) -> None:
        """Begin to record, if that is wanted."""
        if self._recorder is not None:
            self._ask()

    async def stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            with suppress(asyncio.CancelledError):
                await self._asking
        if self._recorder is not None:
            self._recorder.close()

    def end_views(self) -> None:
        """All who watch are told that there is no more."""
        for queue in self._viewers:
            _put(queue, None)

    async def watch(self) -> AsyncIterator[Frame]:
        """Frames as they come; a viewer who is too slow misses some."""
        queue: _Queue = asyncio.Queue(maxsize=1)
        self._viewers.add(queue)
        # What was seen last is of now only if somebody looked until now.
        last = self.frames.last if self._is_asking else None
        self._ask()
        try:
            if last is not None:
                yield last
            while (frame := await queue.get()) is not None:
                yield frame
        finally:
            self._viewers.discard(queue)

    @property
    def _is_asking(self) -> bool:
        return self._asking is not None and not self._asking.done()

    def _ask(self) -> None:
        if not self._is_asking:
            self._asking = asyncio.create_task(self._ask_on())

    async def _ask_on(self) -> None:
        async for seen in self._source.snapshots():
            now_s = time.time()
            if isinstance(seen, NoSnapshotError):
                frame, line = self.frames.lost(str(seen), now_s), Line(now_s, None, str(seen))
            else:
                frame, line = self.frames.seen(seen), Line(now_s, seen)
            if self._recorder is not None:
                self._recorder.add(line)
            for queue in self._viewers:
                _put(queue, frame)
            if not self._viewers and self._recorder is None:
                return


def _put(queue: _Queue, frame: Frame | None) -> None:
    """In the place of one that was not taken yet."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(frame)
