"""Random histories of everything an engine does to a hierarchy, while transfers are under way.

A history is determined by its seed and by what the hierarchy answers; timing is not. So two
tensor-parallel ranks with the same seed make the same calls for as long as, and only if, the
hierarchy's decisions do not depend on how fast either of them is.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from typing import Any

from support_tiers.doubles import Faults, FaultyDisk
from support_tiers.orders import control_of, prompts_of
from support_tiers.shared_blobs import lies
from support_tiers.tier_rig import Request, Rig, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey, namespace_hash
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.calibration import StepObservation
from tiered_kv.tiers.context import host_pages_of
from tiered_kv.tiers.control.control import OPEN_MAX, Order

#: A tenant, and an adapter that has no name by its contents.
TENANT = TreeKey(salt=b"tenant")
UNNAMED = TreeKey(adapter=b"random", is_lasting=False)
MAX_RUNNING = 4
MAX_WAITING = 5
MAX_PAGES = 9
#: No step waits for the disk, which may hang until another step; the machine may be busy.
LONGEST_STEP_S = 5.0


class History:
    """Draws steps and carries them out on `rig`, checking it after each.

    `world` may differ between ranks (faults, delays); `seed` may not.
    """

    def __init__(self, rig: Rig, seed: int, world: int) -> None:
        self.rig = rig
        self.rng = random.Random(seed)
        self.world = random.Random(world)
        self.waiting: dict[str, tuple[array[int], TreeKey | None]] = {}
        self.urgency: dict[str, Urgency] = {}
        rig.hierarchy.prefetch.urgency_of = self.urgency.get
        self.n_arrived = 0
        self.log: list[str] = []
        self.steps: list[tuple[float, Callable[[], str]]] = [
            (6, self._poll),
            (5, self._admit),
            (4, self._admit_waiting),
            (3, self._arrive),
            (3, self._finish),
            (2, self._stash),
            (1, self._abort),
            (1, self._give_up_waiting),
            (0.5, self._wait_no_longer),
            (0.5, self._change_urgency),
            (1, self._reserve_only),
            (2, self._evict_device),
            (1, self._evict_host),
            (0.7, self._change_faults),
            (1, self._observe_step),
            (0.7, self._forecast),
            (0.4, self._flush),
            (0.3, self._change_weights),
            (0.2, self._forget_disk),
            (0.4, self._drain),
            (0.3, self._hang),
            (0.6, self._work_again),
            (0.5, self._others_use_it),
            (0.5, self._order),
            (2, self._go_on_with_orders),
        ]
        self.control = control_of(rig)
        self.orders: list[str] = []
        self.n_weights = 0

    def step(self) -> None:
        weights = [weight for weight, _ in self.steps]
        (chosen,) = self.rng.choices([step for _, step in self.steps], weights)
        started = time.monotonic()
        self.log.append(chosen())
        took = time.monotonic() - started
        assert took < LONGEST_STEP_S, f"{self.log[-1]} waited {took:.1f} s"
        self.rig.check()

    def decisions(self) -> dict[str, Any]:
        """Everything a scheduler could base its next step on."""
        rig, prefetch = self.rig, self.rig.hierarchy.prefetch
        return {
            "log": self.log[-1],
            "forest": rig.forest.view(),
            "device": list(rig.allocator.free_pages),
            "host": {
                node.node_id: host_pages_of(node).tolist()
                for node in rig.forest.nodes()
                if node.state(Tier.HOST) is not Residency.ABSENT
            },
            "ready": {rid: prefetch.done(rid) for rid in self.waiting},
            "loaded": {rid: prefetch.loaded_tokens(rid) for rid in self.waiting},
            "in flight": rig.in_flight,
        }

    def finish(self) -> None:
        """Ends every request, lets everything settle, and looks for anything left over."""
        self._work_again()
        for request in list(self.rig.requests):
            self.rig.finish(request)
        for rid in list(self.waiting):
            self.rig.hierarchy.prefetch.release(rid)
        for name in self.orders:
            self.control.end(name)
        self.rig.drain()
        self.rig.check_idle()
        if self.rig.disk is not None:
            self.rig.check_disk()

    # -- drawing ------------------------------------------------------------------------------

    def _prompt(self) -> tuple[array[int], TreeKey | None]:
        """Few distinct pages, so that prompts share prefixes and part in the middle of nodes."""
        n_pages = self.rng.randint(1, MAX_PAGES)
        pages = [self.rng.choice((1, 1, 1, 2)) for _ in range(n_pages)]
        tail = self.rng.choice((0, 0, 1, 3))
        return tokens_of(*pages, tail=tail), self.rng.choice((None, None, TENANT, UNNAMED))

    def _request(self) -> Request | None:
        return self.rng.choice(self.rig.requests) if self.rig.requests else None

    # -- an administrator ---------------------------------------------------------------------

    def _order(self) -> str:
        if len(self.orders) == OPEN_MAX:
            return "order: enough are open"
        action, tier = self.rng.choice(
            [
                ("inspect", Tier.HOST),
                ("prefetch", Tier.HOST),
                ("prefetch", Tier.DEVICE),
                ("keep", Tier.HOST),
                ("keep", Tier.DISK),
                ("demote", Tier.DISK),
                ("demote", Tier.HOST),
                ("drop", Tier.HOST),
            ]
        )
        order = Order(action, tier, self.rng.choice(("", "a")), self.rng.choice((0.0, 0.1, 9.0)))
        prompt, key = self._prompt()
        name = f"{len(self.log)}"
        self.control.begin(name, order, prompts_of(self.rig, prompt, key=key))
        self.orders.append(name)
        return f"order {name}: {order}"

    def _go_on_with_orders(self) -> str:
        outcomes = []
        for name in list(self.orders):
            is_late = self.rng.random() < 0.1
            outcome, _ = self.control.go_on(name, is_late=is_late)
            if outcome is not None:
                self.control.end(name)
                self.orders.remove(name)
                outcomes.append(f"{name}: {outcome}")
        return f"orders that are done: {outcomes}"

    # -- steps --------------------------------------------------------------------------------

    def _poll(self) -> str:
        self.rig.hierarchy.poll()
        return "poll"

    def _admit(self) -> str:
        if len(self.rig.requests) >= MAX_RUNNING:
            return "admit: enough are running"
        prompt, key = self._prompt()
        return self._admit_one(prompt, key)

    def _admit_one(self, prompt: array[int], key: str | None) -> str:
        request = self.rig.admit(prompt, key)
        if request is None:
            return f"admit {len(prompt)} tokens: no room"
        return f"admit {len(prompt)} tokens: device {request.n_device} host {request.n_host}"

    def _arrive(self) -> str:
        if len(self.waiting) >= MAX_WAITING:
            return "arrive: enough are waiting"
        rid = f"r{self.n_arrived}"
        self.n_arrived += 1
        self.waiting[rid] = self._prompt()
        if self.rng.random() < 0.7:
            self.urgency[rid] = (self.rng.randrange(3), self.rng.random())
        self.rig.arrive(rid, *self.waiting[rid])
        return f"arrive {rid}: {len(self.waiting[rid][0])} tokens"

    def _admit_waiting(self) -> str:
        prefetch = self.rig.hierarchy.prefetch
        for rid, (prompt, key) in self.waiting.items():
            if prefetch.done(rid):
                if len(self.rig.requests) >= MAX_RUNNING:
                    return "admit waiting: enough are running"
                outcome = self._admit_one(prompt, key)
                if "no room" not in outcome:
                    prefetch.release(rid)
                    del self.waiting[rid]
                return f"{rid}: {outcome}"
        return "admit waiting: none is ready"

    def _give_up_waiting(self) -> str:
        if not self.waiting:
            return "give up: none is waiting"
        rid = self.rng.choice(list(self.waiting))
        del self.waiting[rid]
        self.rig.hierarchy.prefetch.release(rid)
        return f"give up {rid}"

    def _wait_no_longer(self) -> str:
        if not self.waiting:
            return "wait no longer: none is waiting"
        rid = self.rng.choice(list(self.waiting))
        self.rig.hierarchy.prefetch.give_up(rid)
        assert self.rig.hierarchy.prefetch.done(rid)
        return f"{rid} waits no longer"

    def _change_urgency(self) -> str:
        if not self.urgency:
            return "change urgency: there is none"
        rid = self.rng.choice(list(self.urgency))
        self.urgency[rid] = (self.rng.randrange(3), self.rng.random())
        return f"{rid} is as urgent as {self.urgency[rid]}"

    def _finish(self) -> str:
        request = self._request()
        if request is None:
            return "finish: none is running"
        self.rig.finish(request)
        return f"finish {len(request.tokens)} tokens"

    def _stash(self) -> str:
        request = self._request()
        if request is None:
            return "stash: none is running"
        n_tokens = self.rng.randint(request.n_protected, len(request.tokens))
        self.rig.stash(request, n_tokens)
        return f"stash {n_tokens} of {len(request.tokens)} tokens"

    def _abort(self) -> str:
        request = self._request()
        if request is None:
            return "abort: none is running"
        self.rig.abort(request)
        return f"abort {len(request.tokens)} tokens"

    def _reserve_only(self) -> str:
        """A load that was reserved for a request which then did not fit into the batch."""
        prompt, key = self._prompt()
        hierarchy = self.rig.hierarchy
        prefix = hierarchy.match(hierarchy.root(key), prompt)
        if not prefix.host:
            return "reserve: nothing on the host"
        self.rig.forest.pin(prefix.last_device, Tier.DEVICE)
        loaded = hierarchy.load_back.load(prefix.last)
        self.rig.forest.unpin(prefix.last_device, Tier.DEVICE)
        return f"reserve: {'no room' if loaded is None else len(loaded[0])}"

    def _evict_device(self) -> str:
        wanted = self.rng.randint(1, 16) * self.rig.page_size
        return f"evict {wanted} from the device: {self.rig.hierarchy.evict_device(wanted)}"

    def _evict_host(self) -> str:
        wanted = self.rng.randint(1, 16)
        self.rig.context.evict_host(wanted)
        return f"evict {wanted} pages from the host"

    def _change_faults(self) -> str:
        """Differently on every rank: one disk may work while the other does not."""
        disk, copier = self.rig.disk, self.rig.copier
        copier.down.error = self.world.choice((*[None] * 5, OSError("no copy to the host")))
        copier.up.error = self.world.choice((*[None] * 5, OSError("no copy to the device")))
        if isinstance(disk, FaultyDisk):
            disk.pages_per_read = self.world.choice((None, None, None, 0, 1, 2))
            disk.pages_per_write = self.world.choice((None, None, None, 0, 2))
            disk.reads.error = self.world.choice((*[None] * 5, OSError("no read")))
            disk.writes.error = self.world.choice((*[None] * 5, OSError("no write")))
        return "faults change"

    def _observe_step(self) -> str:
        """As long as it took on this rank."""
        seconds = self.world.random() * 0.1
        self.rig.hierarchy.observe_step(StepObservation(((64, 0),), 0, 0, seconds))
        return "observe a step"

    def _forecast(self) -> str:
        nodes = self.rig.forest.nodes()
        expected = self.rng.sample(nodes, min(3, len(nodes)))
        self.rig.hierarchy.forecast(
            DemandForecast({node.node_id: Expectation(self.rng.random()) for node in expected})
        )
        return f"expect {len(expected)} nodes"

    def _flush(self) -> str:
        """Whatever is under way; who waits goes on waiting, with nothing on its way for it."""
        for request in list(self.rig.requests):
            self.rig.abort(request)
        self.rig.flush()
        return "flush"

    def _change_weights(self) -> str:
        """Some are in use a second time."""
        hierarchy = self.rig.hierarchy
        hierarchy.put_stores_away()
        self._flush()
        self.n_weights += 1
        name = namespace_hash(f"weights {self.n_weights % 3}")
        if self.rig.disk is not None:
            self.rig.disk = self.rig.disk.of_namespace(name)
        self.rig.namespace = name
        hierarchy.set_namespace(name, self.rig.stores_of(self.rig.disk))
        return f"other weights: {self.n_weights}"

    def _drain(self) -> str:
        assert self.rig.hierarchy.drain()
        return "drain"

    def _hang(self) -> str:
        """A store does not answer, on this rank or not."""
        for faults in self._faults_of_stores():
            if self.world.random() < 0.5:
                faults.hold()
        return "a store hangs"

    def _work_again(self) -> str:
        for faults in self._faults_of_stores():
            faults.release()
        return "the stores answer"

    def _faults_of_stores(self) -> list[Faults]:
        disk, remote = self.rig.disk, self.rig.remote
        faults = [disk.reads, disk.writes] if isinstance(disk, FaultyDisk) else []
        return faults if remote is None else [*faults, remote.reads, remote.writes, remote.asks]

    def _others_use_it(self) -> str:
        """What is shared loses some of it, or tells lies for a while, on this rank or not."""
        remote = self.rig.remote
        if remote is None:
            return "nobody else is there"
        if self.world.random() < 0.5:
            remote.forget(share=0.3, seed=self.world.randrange(1000))
        every = [lie for _, lie in lies(remote)]
        remote.lie = self.world.choice(every) if self.world.random() < 0.5 else None
        return "others use what is shared"

    def _forget_disk(self) -> str:
        if self.rig.disk is None:
            return "forget the disk: there is none"
        self.rig.hierarchy.forget_stored(Tier.DISK)
        self.rig.disk.clear_all()
        return "forget the disk"


def run_history(rig: Rig, seed: int, n_steps: int) -> None:
    """A history of so many steps, to its end; printed if it fails. Closes `rig`."""
    history = History(rig, seed, world=seed)
    try:
        for _ in range(n_steps):
            history.step()
        history.finish()
    except BaseException:
        print("\n".join(history.log))
        raise
    finally:
        rig.close()
