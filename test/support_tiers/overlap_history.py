"""Random histories of what a scheduler does while passes and copies run late.

A history is determined by its seed, and by what the device's schedule lets it see.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from support_tiers.engine import Request, tokens_of
from support_tiers.stream_double import Removed, Schedule
from support_tiers.stream_rig import StreamRig
from tiered_kv.memory.demand import DemandForecast, Expectation

PROMPTS = [
    tokens_of(*pages, tail=1)
    for pages in ((1, 2, 3, 4), (1, 2, 5), (1, 6, 7, 8, 9), (10, 11), (10, 12, 13), (14, 15, 16))
]
MAX_RUNNING = 4
#: Of histories: some of them do much of something.
N_KINDS = 4
N_STEPS = 40


class Overlap:
    """A history of what a scheduler does, drawn from `seed`, on `rig`."""

    def __init__(self, rig: StreamRig, seed: int) -> None:
        self.rig = rig
        self.rng = random.Random(seed)
        self.log: list[str] = []
        self.steps = {
            self.admit: 5.0,
            self.decode: 3.0,
            self.finish: 2.0,
            self.stash: 1.5,
            self.retract: 1.5,
            self.compute_what_is_loaded: 1.0,
            self.make_room: 2.5,
            self.make_room_on_host: 0.7,
            self.load_ahead: 1.0,
            self.poll: 4.0,
            self.fail: 0.7,
            self.read_from_disk: 1.0,
        }
        often = (
            (),
            (self.fail, self.finish, self.read_from_disk),
            (self.fail, self.make_room),
            (self.compute_what_is_loaded, self.make_room),
        )
        for step in often[seed % N_KINDS]:
            self.steps[step] = 6.0

    def run(self, n_steps: int) -> None:
        for _ in range(n_steps):
            (step,) = self.rng.choices(list(self.steps), list(self.steps.values()))
            self.log.append(step.__name__)
            step()
            self.rig.check()
        self.rig.device.calls_until_failure.clear()
        for request in list(self.rig.requests):
            self.rig.decode(request)
            self.rig.finish(request)
        self.rig.settle()
        self.rig.check_idle()

    # -- steps --------------------------------------------------------------------------------

    def _any(self) -> Iterator[Request]:
        if self.rig.requests:
            yield self.rng.choice(self.rig.requests)

    def admit(self) -> None:
        if len(self.rig.requests) < MAX_RUNNING:
            self.rig.admit(self.rng.choice(PROMPTS))

    def decode(self) -> None:
        for request in self._any():
            self.rig.decode(request)

    def stash(self) -> None:
        for request in self._any():
            self.rig.stash(request)

    def finish(self) -> None:
        """Its last pass is still to run, or one that was launched too many; a request that is
        parked leaves its pages in the same way."""
        for request in self._any():
            if self.rng.random() < 0.7:
                self.rig.decode(request)
            self.rig.finish(request)

    def retract(self) -> None:
        for request in self._any():
            self.rig.decode(request)
            self.rig.abort(request)

    def compute_what_is_loaded(self) -> None:
        """Two of one prompt: one has computed all of it when the other loads it."""
        rig, prompt = self.rig, self.rng.choice(PROMPTS)
        if self.rng.random() < 0.5:
            rig.drop_from_device()
        own = rig.allocator.alloc(len(prompt) // rig.page_size * rig.page_size + rig.page_size)
        if own is None or len(rig.requests) >= MAX_RUNNING:
            if own is not None:
                rig.allocator.free(own)
            return
        root = rig.hierarchy.root()
        alone = Request(prompt, root, root, own, 0, 0, 0)
        rig.requests.append(alone)
        rig.forward(alone)
        if self.rng.random() < 0.3:
            rig.admit(prompt)
        else:
            # For a batch that is never formed.
            rig.hierarchy.load_back.load(rig.hierarchy.match(root, prompt).last)
            rig.hierarchy.load_back.start()
        if self.rng.random() < 0.7:
            rig.stash(alone)
            rig.decode(alone)

    def make_room(self) -> None:
        self.rig.hierarchy.evict_device(self.rng.choice((4, 16, 60)))

    def make_room_on_host(self) -> None:
        self.rig.context.evict_host(self.rng.choice((1, 4, 12)))

    def load_ahead(self) -> None:
        nodes = self.rig.forest.nodes()
        expected = self.rng.sample(nodes, min(2, len(nodes)))
        self.rig.hierarchy.forecast(
            DemandForecast({node.node_id: Expectation(0.1) for node in expected})
        )

    def read_from_disk(self) -> None:
        self.rig.read_from_disk(self.rng.choice(PROMPTS))

    def poll(self) -> None:
        self.rig.later(self.rng.choice((0.0, 0.0, 10.0)))

    def fail(self) -> None:
        """Some call of a copy, soon: anywhere between its first and its last."""
        stream = self.rng.choice(("to-host", "to-device"))
        self.rig.device.calls_until_failure[stream] = self.rng.randrange(8)


def sizes_of(seed: int) -> dict[str, int]:
    """Of both pools of a history's rig."""
    device, host = random.Random(seed).choice(((24, 24), (14, 16), (20, 9)))
    return {"n_device_pages": device, "n_host_pages": host}


def run_history(
    seed: int, schedule: Schedule, removed: Removed | None = None, path: str = "dma"
) -> None:
    """Raises whatever goes wrong."""
    rig = StreamRig(schedule, removed, path, **sizes_of(seed))
    history = Overlap(rig, seed)
    try:
        history.run(N_STEPS)
    except BaseException as error:
        error.add_note(f"seed {seed}: {' '.join(history.log)}")
        raise
    finally:
        rig.close()
