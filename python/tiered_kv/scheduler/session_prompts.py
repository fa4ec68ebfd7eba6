"""What the sessions that callers name have had: the prompts of their calls, with the answers.

Names are the callers' inventions, so only so much is remembered: the sessions that were quiet for
longest are forgotten first, and of each the prompts of long ago.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from tiered_kv.forest.key import TreeKey

#: Sessions, prompts of each that nothing goes on from, and tokens of all (8 bytes each).
SESSIONS_MAX = 4096
PROMPTS_MAX = 16
TOKENS_MAX = 1 << 22


@dataclass(frozen=True, slots=True)
class SessionPrompt:
    """A prompt and its answer, as far as they are cached, in the tree of `tree_key`."""

    tree_key: TreeKey | None
    tokens: array[int]


@dataclass(slots=True)
class _Session:
    prompts: list[SessionPrompt] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)


class SessionPrompts:
    """By session and tenant. Work: O(tokens of a prompt) for each call of a session that ends."""

    def __init__(
        self,
        sessions_max: int = SESSIONS_MAX,
        prompts_max: int = PROMPTS_MAX,
        tokens_max: int = TOKENS_MAX,
    ) -> None:
        self._sessions_max, self._prompts_max = sessions_max, prompts_max
        self._tokens_max = tokens_max
        # The one that was quiet for longest first.
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._tenants: dict[str, dict[str, None]] = {}
        """Of each session's name, those who have one of that name."""
        self.n_tokens = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def ended(self, session: str, tenant: str, prompt: SessionPrompt) -> None:
        """A call of the session has its answer. Prompts that it goes on from are part of it."""
        known = self._sessions.pop((session, tenant), None) or _Session()
        self.n_tokens -= known.n_tokens
        prompts = [one for one in known.prompts if not _goes_on(prompt, one)]
        known.prompts = [*prompts, prompt][-self._prompts_max :]
        self.n_tokens += known.n_tokens
        self._sessions[session, tenant] = known
        self._tenants.setdefault(session, {})[tenant] = None
        while len(self._sessions) > self._sessions_max or self.n_tokens > self._tokens_max:
            self.forget(*next(iter(self._sessions)))

    def find(self, session: str, tenant: str | None = None) -> Iterator[SessionPrompt]:
        """All that is remembered of a session of that tenant, or of each who has one so called."""
        tenants = list(self._tenants.get(session, ())) if tenant is None else [tenant]
        for one in tenants:
            known = self._sessions.get((session, one))
            yield from () if known is None else known.prompts

    def forget(self, session: str, tenant: str | None = None) -> None:
        """The session of that tenant, or of each who has one so called, is not remembered."""
        named = self._tenants.get(session, {})
        for one in list(named) if tenant is None else [tenant]:
            known = self._sessions.pop((session, one), None)
            self.n_tokens -= 0 if known is None else known.n_tokens
            named.pop(one, None)
        if not named:
            self._tenants.pop(session, None)


def _goes_on(longer: SessionPrompt, shorter: SessionPrompt) -> bool:
    if longer.tree_key != shorter.tree_key:
        return False
    return longer.tokens[: len(shorter.tokens)] == shorter.tokens
