"""A server with `--tiered-kv` as the backend of SGLang's frontend language.

    import sglang as sgl
    from tiered_kv.frontend.endpoint import ProgramEndpoint, pause

    sgl.set_default_backend(ProgramEndpoint("http://127.0.0.1:30000"))

Functions need no change. With every call of a run travels which program it is of, who forked it and
what follows it (docs/frontend.md). A server that does not know these words passes over them.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sglang.lang import interpreter
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.ir import SglExpr, SglExprList, SglGen, SglSelect

from tiered_kv.frontend.programs import Branch, Pauses, begun

_said = threading.local()
"""`pause_s`: what the thread that executes a chain has read of pauses, until its next call."""


class _Pause(str):
    """No text. SGLang reads it in its turn, in the thread that will make the call behind it."""

    seconds: float

    def __str__(self) -> str:
        _said.pause_s = self.seconds
        return ""


def pause(seconds: float) -> str:
    """Nothing to the model; it says that a pause of so many seconds follows the next call.

    `s += pause(2.5)` before `s += sgl.gen(...)`: a tool will run for about so long, before the
    function goes on from that answer. Raises ValueError below 0.
    """
    if not seconds >= 0:
        raise ValueError(f"a pause must be 0 seconds or more, not {seconds!r}.")
    said = _Pause()
    said.seconds = float(seconds)
    return said


class ProgramEndpoint(RuntimeEndpoint):
    """SGLang's `RuntimeEndpoint`, which says of each call what its program is and does."""

    def __init__(
        self, base_url: str, *args: Any, slo: Mapping[str, object] | None = None, **kwargs: Any
    ) -> None:
        """slo: the objectives of every call (docs/slo.md), such as {"task_ms": 60_000}: what a
        program's user waits for is its end. The rest is `RuntimeEndpoint`'s."""
        super().__init__(base_url, *args, **kwargs)
        # Its route for that is gone from the server; without, a join of this kind adds the text.
        self.support_concate_and_append = False
        self._slo = dict(slo) if slo else None
        self._pauses = Pauses()
        self._branches: weakref.WeakKeyDictionary[Any, Branch] = weakref.WeakKeyDictionary()
        # A chain may end where garbage is collected: in the thread that has the lock, too.
        self._lock = threading.RLock()

    # -- what a program does -------------------------------------------------------------------

    def fork_program(
        self,
        src: Any,
        dst: list[Any],
        position_ids_offset: Any = None,  # noqa: ARG002 - the server places tokens
    ) -> None:
        """`dst` are about to go on from where `src` is, each in its own way."""
        branches = self._branch(src).fork(len(dst))
        with self._lock:
            self._branches.update(zip(dst, branches, strict=True))

    def end_program(self, s: Any) -> None:
        """Nothing will be added to `s`. SGLang says so more than once."""
        with self._lock:
            branch = self._branches.get(s)
        if branch is not None:
            branch.close()

    def commit_lazy_operations(self, s: Any) -> None:
        """Nothing: SGLang's computes what a fork shares in a request of its own, which the branches
        wait for. The server has the first of them compute it, and keeps the others back."""

    # -- calls ---------------------------------------------------------------------------------

    def generate(self, s: Any, sampling_params: Any) -> Any:
        """See `RuntimeEndpoint`."""
        with self._call(s) as custom:
            return super().generate(s, _with_custom(sampling_params, custom))

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[Any]:
        """See `RuntimeEndpoint`."""
        with self._call(s) as custom:
            yield from super().generate_stream(s, _with_custom(sampling_params, custom))

    def select(self, s: Any, *args: Any, **kwargs: Any) -> Any:
        """See `RuntimeEndpoint`. It asks two or three times for one choice."""
        with self._call(s) as custom:
            _said.custom = custom
            try:
                return super().select(s, *args, **kwargs)
            finally:
                _said.custom = None

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        custom = getattr(_said, "custom", None)
        if custom is not None:
            sampling = {**data["sampling_params"], "custom_params": custom}
            data = {**data, "sampling_params": sampling}
        return super()._generate_http_request(s, data)

    @contextmanager
    def _call(self, s: Any) -> Iterator[dict[str, object]]:
        """One call of `s`; gives the `custom_params` that say so."""
        branch = self._branch(s)
        pause_s, _said.pause_s = getattr(_said, "pause_s", None), None
        follows = _follows(s, branch)
        hints = branch.begin(time.monotonic(), follows=follows, pause_s=pause_s)
        yield {"hints": hints} if self._slo is None else {"hints": hints, "slo": self._slo}
        branch.end(time.monotonic())

    def _branch(self, s: Any) -> Branch:
        with self._lock:
            branch = self._branches.get(s)
            if branch is None:
                branch = self._branches[s] = begun(self._pauses, sorted(s.arguments))
            return branch


def _with_custom(sampling_params: Any, custom: dict[str, object]) -> Any:
    """`sampling_params`, which say `custom_params` as well when they are written down."""
    said = copy.copy(sampling_params)
    written = type(sampling_params).to_srt_kwargs
    said.to_srt_kwargs = lambda: {**written(said), "custom_params": custom}
    return said


def _follows(s: Any, branch: Branch) -> bool | None:
    """Whether a call follows the one that `s` is making; None: nobody knows yet."""
    if not s.use_thread:
        return None
    with s.queue.mutex:
        rest = list(s.queue.queue)
    open_names = [name for name, event in list(s.variable_event.items()) if not event.is_set()]
    # A scope of variables is open, too, until it ends: its value is where it began.
    n_open = sum(not isinstance(s.variables.get(name), int) for name in open_names)
    if n_open > 1 or any(map(_has_call, rest)):
        return True
    return False if branch.is_over else None


def _has_call(expr: SglExpr | None) -> bool:
    if isinstance(expr, SglExprList):
        return any(map(_has_call, expr.expr_list))
    return isinstance(expr, SglGen | SglSelect)


def _tell_of_forks(fork: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """AROUND `StreamExecutor.fork`: calls `fork_program`, which SGLang declares and never calls."""

    @functools.wraps(fork)
    def told(s: Any, *args: Any, **kwargs: Any) -> list[Any]:
        branches = fork(s, *args, **kwargs)
        if isinstance(s.backend, ProgramEndpoint):
            s.backend.fork_program(s, branches)
        return branches

    return told


interpreter.StreamExecutor.fork = _tell_of_forks(interpreter.StreamExecutor.fork)
