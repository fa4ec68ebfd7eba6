"""Recorded coding-agent sessions: lengths, pauses, and blocks shared with the call before.

One JSON object a line: `block_size`, `tool_tokens`, `system_tokens`, and `requests`, each with `in`
and `out` (tokens), `think_time` (seconds before the call), `lcp` (blocks kept of the session's
previous prompt) and `new` ([first id, count] of the blocks after them), and perhaps `stop` (how the
answer ended: `tool_use`, `end_turn`). Ids are local to a session.
A request of type "subagent" holds a list `sub` of calls: a chain of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiered_kv.simulation.workload.arrivals import Arrivals
from tiered_kv.simulation.workload.block_ids import STRIDE, own_blocks, shared_blocks
from tiered_kv.simulation.workload.readers.lines import Line, json_lines, require_some
from tiered_kv.simulation.workload.sessions import Call, SessionWorkload

_EMPTY: array[int] = array("q")


@dataclass(frozen=True, slots=True)
class _Step:
    """One recorded call."""

    start_s: float
    input_tokens: int
    output_tokens: int
    pause_s: float
    kept_blocks: int
    new: tuple[tuple[int, int], ...]
    ending: str


class RecordedChain:
    """The calls of one agent, each keeping a prefix of the prompt before."""

    def __init__(
        self, session: int, block_tokens: int, front: array[int], steps: Sequence[_Step]
    ) -> None:
        """`front` are global ids for as many leading blocks of the first prompt.

        `steps` must have been checked (see `read_agent_sessions`).
        """
        self._session = session
        self._block_tokens = block_tokens
        self._steps = steps
        first = _expand(steps[0].new)
        self._shared = dict(zip(first, front, strict=False))
        self._last: tuple[int, array[int]] = (-1, _EMPTY)

    def __len__(self) -> int:
        return len(self._steps)

    def call(self, turn: int) -> Call:
        """Call number `turn`; cheapest when asked for in order."""
        step = self._steps[turn]
        blocks = self._prompt(turn)
        following = self._steps[turn + 1] if turn + 1 < len(self._steps) else None
        return Call(
            blocks,
            step.input_tokens,
            step.output_tokens,
            step.pause_s if turn else 0.0,
            self._output(len(blocks), step, following),
            None if following is None else following.pause_s,
            step.ending,
        )

    def _prompt(self, turn: int) -> array[int]:
        """Ids of the prompt's whole blocks."""
        reached, blocks = self._last if self._last[0] <= turn else (-1, _EMPTY)
        for index in range(reached + 1, turn + 1):
            step = self._steps[index]
            blocks = blocks[: step.kept_blocks] + self._global(step.new)
        self._last = (turn, blocks)
        return blocks

    def _output(self, n_blocks: int, step: _Step, following: _Step | None) -> array[int]:
        """The output's blocks, if the next prompt goes on after prompt and output."""
        end_tokens = step.input_tokens + step.output_tokens
        if (
            following is None
            or following.kept_blocks != n_blocks
            or following.input_tokens < end_tokens
        ):
            return _EMPTY
        return self._global(following.new)[: end_tokens // self._block_tokens - n_blocks]

    def _global(self, runs: Sequence[tuple[int, int]]) -> array[int]:
        base = own_blocks(self._session, 0, 1)[0]
        shared = self._shared
        return array("q", [shared.get(block, base + block) for block in _expand(runs)])


def read_agent_sessions(
    path: Path, arrivals: Arrivals | None = None, *, seed: int = 0, users: int = 0
) -> SessionWorkload:
    """The sessions at `path`; sub-agents are sessions that start when they did.

    The file has no times between sessions: they start by `arrivals` (a Poisson process of one in
    ten seconds unless given), or `users` at a time. Sessions with equal numbers of tool and system
    tokens are taken to start with the same blocks. Hints are the recorded pauses: perfect
    foresight. Outputs count as reusable where the next prompt is long enough to hold them. Raises
    WorkloadError, also if sessions differ in block size.
    """
    chains: list[RecordedChain] = []
    offsets_s: list[tuple[int, float]] = []
    fronts: dict[tuple[int, int, int], int] = {}
    block_tokens = 0
    n_lines = 0
    for n_lines, line in enumerate(json_lines(path), start=1):
        size = line.count("block_size", minimum=1)
        if block_tokens and size != block_tokens:
            raise line.error(f"block_size is {size} but was {block_tokens}; don't mix them")
        block_tokens = size
        for part, offset_s in _chains(line):
            steps = _steps(part, block_tokens)
            if not steps:
                continue
            front = _front(part, block_tokens, fronts)
            chains.append(RecordedChain(len(chains), block_tokens, front, steps))
            offsets_s.append((n_lines - 1, offset_s))
    require_some(chains, path)
    process = arrivals or Arrivals(0.1)
    times = process.times(n_lines, np.random.default_rng([seed, 7]))
    starts_s = [float(times[session]) + offset_s for session, offset_s in offsets_s]
    order = sorted(range(len(chains)), key=lambda index: (starts_s[index], index))
    return SessionWorkload(
        path.stem,
        block_tokens,
        [chains[index] for index in order],
        [starts_s[index] for index in order],
        users=users,
    )


def _chains(line: Line) -> list[tuple[Line, float]]:
    """The main agent and its sub-agents, each with its start after the session's, seconds."""
    found = [(line, 0.0)]
    for item in line.items("requests"):
        record = line.within(item, "a request")
        if record.has("sub"):
            found.append((record, record.number_of("t")))
    return found


def _steps(part: Line, block_tokens: int) -> list[_Step]:
    steps: list[_Step] = []
    n_blocks = 0
    key = "sub" if part.has("sub") else "requests"
    for item in part.items(key):
        record = part.within(item, "a request")
        if record.has("sub"):
            continue
        step = _step(record, steps[-1] if steps else None)
        if step.kept_blocks > n_blocks:
            raise record.error(
                f"lcp is {step.kept_blocks} but the prompt before has {n_blocks} blocks"
            )
        n_blocks = step.kept_blocks + sum(count for _, count in step.new)
        if n_blocks != step.input_tokens // block_tokens:
            raise record.error(
                f"lcp and new make {n_blocks} blocks, which don't fit {step.input_tokens} tokens "
                f"in blocks of {block_tokens}"
            )
        steps.append(step)
    return steps


def _step(record: Line, before: _Step | None) -> _Step:
    start_s = record.number_of("t")
    if record.has("think_time"):
        pause_s = record.number_of("think_time")
    else:
        # Missing now and then; the gap between the starts has the answer's time in it too.
        pause_s = max(0.0, start_s - before.start_s) if before else 0.0
    new = []
    for run in record.items("new"):
        try:
            first, count = map(int, run)
        except (TypeError, ValueError):
            raise record.error("new must hold pairs of a first id and a count") from None
        if first < 0 or count < 0 or first + count >= STRIDE:
            raise record.error(f"ids and counts in new must be from 0 to {STRIDE - 1}")
        new.append((first, count))
    return _Step(
        start_s=start_s,
        input_tokens=record.count("in", minimum=1),
        output_tokens=max(1, record.count("out")),
        pause_s=pause_s,
        kept_blocks=record.count("lcp"),
        new=tuple(new),
        ending=record.text("stop") if record.has("stop") else "",
    )


def _front(part: Line, block_tokens: int, fronts: dict[tuple[int, int, int], int]) -> array[int]:
    """Global ids of the blocks of tools and system prompt, equal for equal token counts."""
    tools, system = part.count("tool_tokens"), part.count("system_tokens")
    # Main agents and sub-agents have different instructions.
    content = fronts.setdefault((tools, system, int(part.has("sub"))), len(fronts))
    return shared_blocks(content, (tools + system) // block_tokens)


def _expand(runs: Sequence[tuple[int, int]]) -> array[int]:
    ids: array[int] = array("q")
    for first, count in runs:
        ids.extend(range(first, first + count))
    return ids
