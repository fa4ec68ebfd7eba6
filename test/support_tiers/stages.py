"""Stages of a pipeline on a thread each, which wait for each other as SGLang's do and no more.

After managers/scheduler_pp_mixin.py: a stage begins a pass when the one before it has (requests are
handed on first), launches it when that has ended it (it hands its activations on last), and ends it
when that has launched the next (what the last stage has computed goes around through the first, a
pass behind). The first ends a pass when the last has launched the one whose results it wants. Who
waits longer than PATIENCE_S is waited for by whom he waits for: the test fails.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from support_tiers.doubles import PATIENCE_S


class StuckError(AssertionError):
    """A stage waits for another that waits for it, or has failed."""


class Pipeline:
    """What `n_stages` threads share."""

    def __init__(self, n_stages: int, lag: int | None = None) -> None:
        self.n_stages = n_stages
        self.lag = n_stages if lag is None else lag
        self._news = threading.Condition()
        self._begun = [0] * n_stages
        self._launched = [0] * n_stages
        self._ended = [0] * n_stages
        self._rounds: list[list[list[int] | None]] = []
        self._given = [0] * n_stages
        self._has_failed = False

    def stage(self, index: int) -> StageOfPipeline:
        return StageOfPipeline(self, index)

    def fail(self) -> None:
        with self._news:
            self._has_failed = True
            self._news.notify_all()

    def begin_pass(self, stage: int, n_pass: int) -> None:
        if stage:
            self._until(lambda: self._begun[stage - 1] >= n_pass)
        self._come(self._begun, stage, n_pass)

    def launch(self, stage: int, n_pass: int) -> None:
        if stage:
            self._until(lambda: self._ended[stage - 1] >= n_pass)
        self._come(self._launched, stage, n_pass)

    def end_pass(self, stage: int, n_pass: int) -> None:
        if stage:
            self._until(lambda: self._launched[stage - 1] > n_pass)
        else:
            self._until(lambda: self._launched[-1] > n_pass - self.n_stages)
        self._come(self._ended, stage, n_pass)

    def _come(self, where: list[int], stage: int, n_pass: int) -> None:
        with self._news:
            where[stage] = n_pass
            self._news.notify_all()

    def leave(self, stage: int) -> None:
        """This stage has come to its end: nobody waits for more of it."""
        for where in (self._begun, self._launched, self._ended):
            self._come(where, stage, sys.maxsize)

    def _until(self, has_come: Callable[[], bool]) -> None:
        with self._news:
            came = self._news.wait_for(lambda: has_come() or self._has_failed, PATIENCE_S)
        if not came or self._has_failed:
            raise StuckError("a stage waits for ever")

    def give(self, stage: int, values: list[int]) -> Callable[[], list[int]]:
        with self._news:
            number = self._given[stage]
            self._given[stage] += 1
            if number == len(self._rounds):
                self._rounds.append([None] * self.n_stages)
            self._rounds[number][stage] = values
            self._news.notify_all()
        votes = self._rounds[number]

        def agreed() -> list[int]:
            self._until(lambda: all(own is not None for own in votes))
            columns = zip(*(own for own in votes if own is not None), strict=True)
            return [min(column) for column in columns]

        return agreed


class StageOfPipeline:
    """A `tiers.transfer.Meeting`."""

    def __init__(self, pipeline: Pipeline, index: int) -> None:
        self.n_pass = 0
        self.lag = pipeline.lag
        self.index = index
        self._pipeline = pipeline

    def begin_pass(self) -> None:
        self._pipeline.begin_pass(self.index, self.n_pass + 1)
        self.n_pass += 1

    def launch(self) -> None:
        self._pipeline.launch(self.index, self.n_pass)

    def leave(self) -> None:
        self._pipeline.leave(self.index)

    def end_pass(self) -> None:
        self._pipeline.end_pass(self.index, self.n_pass)

    def give(self, values: list[int]) -> Callable[[], list[int]]:
        return self._pipeline.give(self.index, values)
