"""A single tier of so many pages, prompts one after the other, and what a policy makes of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.eviction import Eviction, eviction_policies


@dataclass(slots=True)
class Outcome:
    pages: int = 0
    hits: int = 0

    @property
    def hit_share(self) -> float:
        return self.hits / self.pages if self.pages else 0.0


class OneTier:
    """Pages of one token; a prompt is its list of page names."""

    def __init__(self, policy: str, n_pages: int) -> None:
        self.forest = Forest(1)
        self.policy = Eviction(self.forest, eviction_policies.get(policy))
        self.n_pages = n_pages
        self.root = self.forest.root(namespace_hash("game"))
        self.outcome = Outcome()

    def ask(self, prompt: Sequence[int]) -> int:
        """Serves one prompt; returns how many of its pages were there."""
        forest, pages = self.forest, array("q", prompt[: self.n_pages])
        match = forest.match(self.root, pages)
        forest.pin(match.last, Tier.DEVICE)
        self._make_room(len(pages) - match.n_tokens)
        forest.insert(self.root, pages, range(len(pages)))
        forest.unpin(match.last, Tier.DEVICE)
        self.outcome.pages += len(prompt)
        self.outcome.hits += match.n_tokens
        return match.n_tokens

    def expect(self, prompts: Iterable[Sequence[int]]) -> None:
        """These are asked next, a second after each other."""
        expected: dict[int, Expectation] = {}
        for at, prompt in enumerate(prompts):
            known = self.forest.peek(self.root, array("q", prompt[: self.n_pages]))
            last = known.partial or (known.path[-1] if known.path else None)
            if last is not None:
                expected.setdefault(last.node_id, Expectation(float(at)))
        self.policy.on_forecast(DemandForecast(expected))

    def _make_room(self, n_new: int) -> None:
        shortage = n_new - (self.n_pages - self.forest.resident_tokens(Tier.DEVICE))
        if shortage <= 0:
            return
        victims = self.policy.victims(Tier.DEVICE, shortage)
        surplus = sum(node.n_pages for node in victims) - shortage
        assert surplus >= 0, "a tier that holds a whole prompt can always make room for it"
        if surplus:
            self.forest.split(victims[-1], surplus)
        for node in victims:
            self.forest.evict(node, Tier.DEVICE)


def play(policy: str, n_pages: int, prompts: Iterable[Sequence[int]]) -> Outcome:
    tier = OneTier(policy, n_pages)
    for prompt in prompts:
        tier.ask(prompt)
    return tier.outcome
