"""How fast a machine is now, against when its server was measured, and several servers in turn.

A shared machine changes its speed by tens of percent within minutes, and a queue multiplies that.
So what is compared takes turns in short rounds, on servers that are all up and of which one works;
around each round a few passes on one more server tell how fast the machine was.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmark.simulation.probe import Probe
from harness.server import Server
from harness.servers import servers_up
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.simulation.measured_server import MeasuredServer

#: The passes that are timed again and again.
PREFILL_TOKENS = 256
DECODE_REQUESTS, DECODE_CONTEXT, DECODE_TOKENS = 4, 512, 8
REPEATS = 2


@dataclass(frozen=True)
class Pace:
    """Seconds that passes take, as multiples of what was fitted when the server was measured."""

    prefill: float
    decode: float

    def __str__(self) -> str:
        return f"{self.prefill:.2f}x / {self.decode:.2f}x"


def between(before: Pace, after: Pace) -> Pace:
    """What to take for the time between two measurements."""
    return Pace((before.prefill + after.prefill) / 2, (before.decode + after.decode) / 2)


def median(paces: Sequence[Pace]) -> Pace:
    """Of several measurements of the same time."""
    prefill = statistics.median(pace.prefill for pace in paces)
    return Pace(prefill, statistics.median(pace.decode for pace in paces))


def at_pace(server: MeasuredServer, pace: Pace) -> MeasuredServer:
    """`server` on a machine that is as fast as `pace` says."""
    times = {
        name: seconds * (pace.prefill if name.startswith("prefill") else pace.decode)
        for name, seconds in asdict(server.times).items()
    }
    return replace(
        server,
        times=PassTimes(**times),
        request_overhead_s=server.request_overhead_s * pace.prefill,
    )


class PaceMaker:
    """Times passes on a server that nobody else uses, of which `server` holds the measurements."""

    def __init__(self, url: str, server: MeasuredServer) -> None:
        self._probe = Probe(url, seed=3)
        self._times = server.times
        self._prefix = self._probe.tokens(DECODE_CONTEXT)
        self._probe.ask(self._prefix, 4)

    def measure(self, repeats: int = REPEATS) -> Pace:
        """About ten seconds on two cores with two repeats.

        Raises RuntimeError if no pass could be timed.
        """
        times, prefills, decodes = self._times, list[float](), list[float]()
        for _ in range(repeats):
            prefill = self._probe.prefill(1, PREFILL_TOKENS, ())
            if prefill is not None:
                fitted_s = times.prefill_pass_s(prefill.chunks)
                prefills.append(prefill.seconds / fitted_s)
            passes = self._probe.decode(DECODE_REQUESTS, self._prefix, DECODE_TOKENS)
            if passes is not None:
                fitted_s = times.decode_pass_s(passes.context_tokens, passes.n_requests)
                decodes.append(passes.seconds / fitted_s)
        if not prefills or not decodes:
            raise RuntimeError("No reference pass could be timed; is the machine busy?")
        return Pace(statistics.fmean(prefills), statistics.fmean(decodes))


def warm_servers(
    model_path: Path, args_of: Mapping[str, Sequence[str]], logs: Path
) -> AbstractContextManager[dict[str, Server]]:
    """Servers by name, warmed up; each takes about 2 GB of memory with the demo model."""
    servers = {
        name: Server(args, logs / f"{name}.log", model_path) for name, args in args_of.items()
    }
    return servers_up(servers, _warm_up)


def _warm_up(server: Server) -> None:
    """Threads and lazily imported code are not measured; prompts are not the workload's."""
    probe = Probe(server.url, seed=4)
    probe.ask(probe.tokens(512), 4)
    server.flush_cache()
