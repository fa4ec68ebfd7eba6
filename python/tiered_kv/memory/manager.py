"""What moves between the tiers, and when: the one place that decides it.

Every method looks at the forest and returns actions; none moves bytes or changes residency. (The
one thing it does to the forest is to split a node of which only a part is to go, or to come.)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import Match
from tiered_kv.memory.actions import Drop, Load, WriteBack
from tiered_kv.memory.costs import Costs, EqualCosts
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.eviction import Eviction, OrderFactory, eviction_policies
from tiered_kv.memory.keeps import Keeps
from tiered_kv.memory.load_policy import TOLERANCE, LoadPolicy, LoadQuestion, pages_to_load
from tiered_kv.memory.store_value import StoreWrites, is_worth_sharing

#: What is expected later than this, or is less probable, is not loaded ahead.
LOAD_AHEAD_S = 10.0
LOAD_AHEAD_PROBABILITY = 0.5
#: A request whose pages are loaded whatever it costs waits for them no longer than this.
PATIENCE_S = 60.0


class MemoryManager:
    """Write-through to host and disk, eviction by policy, loads on demand and ahead of it."""

    def __init__(
        self,
        forest: Forest,
        config: MemoryConfig,
        costs: Costs | None = None,
        *,
        make_order: OrderFactory | None = None,
    ) -> None:
        """Without `costs`, whatever can be loaded is. Raises ConfigError for an unknown policy.

        make_order: an order of eviction in place of the one that `config` names.
        """
        self._forest = forest
        self._costs = costs if costs is not None else EqualCosts()
        self._known_costs = costs
        self.keeps = Keeps()
        self._eviction = Eviction(
            forest,
            make_order or eviction_policies.get(config.eviction_policy),
            protect_expected=config.protect_expected,
            keeps=self.keeps,
        )
        self._load_policy = LoadPolicy(config.load_policy)
        self._store_writes = StoreWrites(config.store_writes)
        if costs is None and self._load_policy is LoadPolicy.COST:
            self._load_policy = LoadPolicy.ALWAYS
        self._enabled = {
            Tier.DEVICE: True,
            Tier.HOST: config.host_enabled,
            Tier.DISK: config.disk_enabled,
            Tier.STORE: True,
        }

    # -- downwards ----------------------------------------------------------------------------

    def on_insert(self, adopted: Iterable[Node]) -> list[WriteBack]:
        """`adopted` became RESIDENT on the device: those the host lacks are written through."""
        return self._write_through(adopted, Tier.DEVICE, Tier.HOST)

    def on_host_resident(self, nodes: Iterable[Node], target: Tier) -> list[WriteBack]:
        """`nodes` became RESIDENT on the host, or were used: those that `target` lacks and is to
        have are written through to it."""
        if target is Tier.STORE:
            nodes = filter(self._is_to_be_shared, nodes)
        return self._write_through(nodes, Tier.HOST, target)

    def on_leave(self, nodes: Iterable[Node], target: Tier) -> list[WriteBack]:
        """This server ends: what only its host has is of use to the others."""
        if target is Tier.STORE and self._store_writes is StoreWrites.NONE:
            return []
        return self._write_through(nodes, Tier.HOST, target)

    def _is_to_be_shared(self, node: Node) -> bool:
        if self._store_writes is not StoreWrites.VALUE:
            return self._store_writes is StoreWrites.ALL
        return is_worth_sharing(node, Tier.STORE, self._known_costs, self._forest.page_size)

    def write_value(self, node: Node) -> float:
        """What a copy of `node` farther down is worth: seconds per token to compute it again.

        Where not everything can be written, the most valuable goes first: what was used before,
        and what is deep in its prompt.
        """
        uses = 1.0 + min(node.hits, 8)
        return uses * self._costs.recompute_s(node.start, node.end) / node.n_tokens

    def on_last_use(self, last: Node) -> None:
        """Nobody will go on from `last`, as whoever came so far says."""
        self._eviction.let_go(last)

    def on_pressure(self, tier: Tier, n_pages: int) -> list[Drop]:
        """Drops that free `n_pages` pages of `tier`, or all that can be freed if that is less.

        Carried out in order each is legal, provided that nothing else happens in between. The last
        victim is split, so that its leading pages stay if they may.
        """
        victims = self._eviction.victims(tier, n_pages)
        surplus = sum(node.n_pages for node in victims) - n_pages
        if victims and surplus > 0:
            # The lower half stays the same object, so the victim is now the part that must go.
            self._forest.split(victims[-1], surplus)
        if self.keeps:
            for node in victims:
                self.keeps.gave_way(tier, node.last_page_hash, node.n_pages)
        return [Drop(node.node_id, tier) for node in victims]

    # -- upwards ------------------------------------------------------------------------------

    def on_match(
        self,
        match: Match,
        *,
        prompt_tokens: int | None = None,
        queued_bytes: int = 0,
        least_pages: int = 0,
    ) -> Load | None:
        """Those nodes on the host that continue what the device has of `match` and pay to load.

        Nodes that are LOADING on the device count as being there. prompt_tokens: the length of the
        whole prompt, if it goes on after `match`. queued_bytes: what is ahead on the way to the
        device. least_pages: so many if there are as many, whatever they cost (see `Probes`). The
        node in which the boundary falls is split there.
        """
        run = _host_run(match.path)
        if not run:
            return None
        n_tokens = max(prompt_tokens or 0, match.n_tokens)
        n_pages = self._worth_loading(
            Tier.HOST,
            Tier.DEVICE,
            n_pages=sum(node.n_pages for node in run),
            start=run[0].start,
            prompt_tokens=n_tokens,
            queued_bytes=queued_bytes,
            least_pages=least_pages,
        )
        wanted = self._leading(run, n_pages)
        return Load(tuple(wanted), Tier.HOST, Tier.DEVICE) if wanted else None

    def on_whole_match(
        self, match: Match, *, start: int, prompt_tokens: int | None, queued_bytes: int
    ) -> Load | None:
        """As `on_match`, but all of the run or nothing: between there is no state to go on from.

        start: from where on the prompt is computed if nothing is loaded, in tokens.
        """
        run = _host_run(match.path)
        if not run or self._load_policy is LoadPolicy.NEVER:
            return None
        costs, n_tokens = self._costs, sum(node.n_tokens for node in run)
        load_s = costs.load_s(
            Tier.HOST,
            Tier.DEVICE,
            int(n_tokens * costs.bytes_per_token(Tier.HOST)),
            queued_bytes,
        )
        end = max(prompt_tokens or 0, match.n_tokens)
        rest_s = costs.recompute_s(match.n_tokens, end)
        is_worth = max(load_s, rest_s) <= costs.recompute_s(start, end) * (1.0 + TOLERANCE)
        if self._load_policy is LoadPolicy.COST and not is_worth:
            return None
        return Load(tuple(node.node_id for node in run), Tier.HOST, Tier.DEVICE)

    def pages_from(
        self,
        source: Tier,
        n_pages: int,
        start: int,
        prompt_tokens: int,
        *,
        queued_bytes: int = 0,
        wait_s: float = 0.0,
        least_pages: int = 0,
    ) -> int:
        """Of `n_pages` pages in a store, from token `start` of a prompt on: how many to read.

        They reach the host before the request runs. wait_s: how long it would wait in any case.
        least_pages: as in `on_match`.
        """
        return self._worth_loading(
            source,
            Tier.HOST,
            n_pages=n_pages,
            start=start,
            prompt_tokens=max(prompt_tokens, start + n_pages * self._forest.page_size),
            queued_bytes=queued_bytes,
            wait_s=wait_s,
            least_pages=least_pages,
        )

    def patience_s(self, n_pages: int, start: int, read_s: float) -> float:
        """How long a request may wait for such pages before computing them is the better bet.

        Twice as long as reading should take (`read_s`), and at least as long as computing does:
        then the loss is bounded by what the read was to save, and a slow moment costs no page.
        Where costs don't count, a fixed time.
        """
        if self._load_policy is not LoadPolicy.COST:
            return PATIENCE_S
        end = start + n_pages * self._forest.page_size
        return max(2.0 * read_s, self._costs.recompute_s(start, end))

    def read_s(self, source: Tier, n_pages: int, queued_bytes: int = 0) -> float:
        """Seconds until that many pages in a store are on the host, behind what is queued."""
        n_tokens = n_pages * self._forest.page_size
        n_bytes = int(n_tokens * self._costs.bytes_per_token(source))
        return self._costs.load_s(source, Tier.HOST, n_bytes, queued_bytes)

    def on_forecast(self, forecast: DemandForecast, device_pages_free: int) -> list[Load]:
        """Protects what is expected, and loads it ahead into device pages that are free anyway.

        Soonest first; nothing is evicted for it.
        """
        self._eviction.on_forecast(forecast)
        loads: list[Load] = []
        if self._load_policy is LoadPolicy.NEVER:
            return loads
        soonest = sorted(forecast.next_use.items(), key=lambda item: (item[1].starts_in_s, item[0]))
        taken: set[int] = set()
        for node_id, expected in soonest:
            if expected.starts_in_s > LOAD_AHEAD_S or device_pages_free <= 0:
                break
            node = self._forest.find(node_id)
            if node is None or expected.probability < LOAD_AHEAD_PROBABILITY:
                continue
            run = [n for n in _host_run(_path_to(node)) if n.node_id not in taken]
            wanted = self._leading(run, min(device_pages_free, sum(n.n_pages for n in run)))
            if wanted:
                loads.append(Load(wanted, Tier.HOST, Tier.DEVICE))
                taken.update(wanted)
                device_pages_free -= sum(self._forest.node(n).n_pages for n in wanted)
        return loads

    # -- internals ----------------------------------------------------------------------------

    def _worth_loading(
        self,
        source: Tier,
        target: Tier,
        *,
        n_pages: int,
        start: int,
        prompt_tokens: int,
        queued_bytes: int,
        wait_s: float = 0.0,
        least_pages: int = 0,
    ) -> int:
        if self._load_policy is LoadPolicy.NEVER:
            return 0
        if self._load_policy is LoadPolicy.ALWAYS:
            return n_pages
        costs = self._costs
        page_bytes = self._forest.page_size * costs.bytes_per_token(max(source, target))

        def load_s(queued: int, k: int) -> float:
            return costs.load_s(source, target, int(k * page_bytes), queued)

        worth = pages_to_load(
            LoadQuestion(
                n_pages=n_pages,
                page_tokens=self._forest.page_size,
                start=start,
                prompt_tokens=prompt_tokens,
                load_s=partial(load_s, queued_bytes),
                recompute_s=costs.recompute_s,
                overlapped=target is Tier.DEVICE,
                wait_s=wait_s,
            )
        )
        return max(worth, min(least_pages, n_pages))

    def _leading(self, run: list[Node], n_pages: int) -> tuple[int, ...]:
        """The ids of the nodes that make up the first `n_pages` pages of `run`."""
        wanted: list[int] = []
        for node in run:
            if n_pages <= 0:
                break
            if node.n_pages > n_pages:
                node = self._forest.split(node, n_pages)[0]  # noqa: PLW2901
            wanted.append(node.node_id)
            n_pages -= node.n_pages
        return tuple(wanted)

    def _write_through(self, nodes: Iterable[Node], source: Tier, target: Tier) -> list[WriteBack]:
        if not self._enabled[target]:
            return []
        return [
            WriteBack(node.node_id, source, target)
            for node in nodes
            if node.state(source) is Residency.RESIDENT and node.state(target) is Residency.ABSENT
        ]


def _host_run(path: Iterable[Node]) -> list[Node]:
    """The nodes that the host can add to what the device has of a path."""
    run: list[Node] = []
    for node in path:
        if node.state(Tier.DEVICE) is not Residency.ABSENT:
            continue
        if node.state(Tier.HOST) is not Residency.RESIDENT:
            break
        run.append(node)
    return run


def _path_to(node: Node) -> list[Node]:
    path: list[Node] = []
    at: Node | None = node
    while at is not None and not at.is_root:
        path.append(at)
        at = at.parent
    return path[::-1]
