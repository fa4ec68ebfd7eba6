"""How long something took, and for how much of that the machine is to blame.

On a machine that others use, too, the longest of many times says little: a thread that is ready to
run may have to wait for a core. The kernel counts that wait for every thread (the run delay), and a
process that does nothing but sleep a millisecond at a time shows what it is like to be here at all.

Run by itself it is such a process: `python delays.py` beats until its input ends.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BEAT_S = 0.001
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Distribution:
    """Of many times, in milliseconds."""

    count: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    max_less_delay_ms: float
    """The longest, after from each was taken what one thread of the process, the one that had to
    wait longest for a core during it, waited. (That others waited one after the other isn't taken
    off: the true figure is lower.)"""


class RunDelays:
    """For how long threads of this process were ready to run while others had the cores."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self) -> dict[str, float]:
        """Seconds since each thread began, by its id; empty where the kernel doesn't count."""
        threads = {task.name for task in _TASKS.iterdir()}
        for gone in self._files.keys() - threads:
            os.close(self._files.pop(gone))
        delays = {}
        for thread in threads:
            try:
                if thread not in self._files:
                    self._files[thread] = os.open(_TASKS / thread / "schedstat", os.O_RDONLY)
                fields = os.pread(self._files[thread], 128, 0).split()
            except OSError:  # It has ended.
                continue
            delays[thread] = int(fields[1]) / 1e9
        return delays

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


class Times:
    """Collects the times that something took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._delays: list[float] = []
        self._run_delays = RunDelays()

    def measure(self, act: Callable[[], object]) -> None:
        before = self._run_delays.read()
        started = time.perf_counter()
        act()
        self.seconds.append(time.perf_counter() - started)
        after = self._run_delays.read()
        waits = (after[thread] - before.get(thread, 0.0) for thread in after)
        self._delays.append(max(waits, default=0.0))

    def distribution(self, expected_s: float = 0.0) -> Distribution:
        """By how much all so far took longer than expected; nothing more is to be measured."""
        self._run_delays.close()
        times = sorted(seconds - expected_s for seconds in self.seconds)
        ours = (s - d for s, d in zip(self.seconds, self._delays, strict=True))

        def quantile_ms(q: float) -> float:
            return times[min(int(q * len(times)), len(times) - 1)] * 1e3

        return Distribution(
            len(times),
            quantile_ms(0.5),
            quantile_ms(0.99),
            quantile_ms(0.999),
            times[-1] * 1e3,
            (max(ours) - expected_s) * 1e3,
        )


def slowest_call(owner: object, name: str) -> list[float]:
    """Times a method from now on; the longest of its calls is in the list that is returned."""
    longest = [0.0]
    original = getattr(owner, name)

    def timed(*args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            longest[0] = max(longest[0], time.perf_counter() - started)

    setattr(owner, name, timed)
    return longest


def slowest_collection() -> list[float]:
    """The longest pass of the garbage collector from now on is in the list that is returned: CPU
    time of the thread that makes it, while no other thread has the interpreter."""
    longest = [0.0]
    began = 0.0

    def note(phase: str, _: object) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            longest[0] = max(longest[0], time.thread_time() - began)

    gc.callbacks.append(note)
    return longest


class Pulse:
    """A thread that does something every millisecond and notes how long it took."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._times = Times()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        while not self._stop.is_set():
            self._times.measure(self._act)
            time.sleep(BEAT_S)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def distribution(self, expected_s: float = 0.0) -> Distribution:
        """By how much it took longer than expected."""
        return self._times.distribution(expected_s)


class Control:
    """A process that only sleeps, a millisecond at a time: by how much it slept too long."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> Distribution:
        said, _ = self._process.communicate()
        return Distribution(**json.loads(said))


def beat() -> None:
    """See `Control`."""
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end).start()
    print("ready", flush=True)
    times = Times()
    while not ended.is_set():
        times.measure(lambda: time.sleep(BEAT_S))
    print(json.dumps(vars(times.distribution(BEAT_S))))


if __name__ == "__main__":
    beat()
