"""Gangs that are still arriving: branches of one fork are admitted together.

A program that forks sends its branches one after the other, some milliseconds apart. The first one
would start a pass of its own, and the others wait for the end of that; together they are one pass,
and decode in step from then on. So who says how many are coming is kept back until they are here,
for `FORMING_S` at most: nobody waits long for those who never come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tiered_kv.scheduler.request import QueuedRequest

#: Seconds that the first of a gang waits for the rest.
FORMING_S = 0.05


@dataclass(slots=True)
class _Gang:
    until_s: float
    members: set[int] = field(default_factory=set)
    n_came: int = 0


class Forming:
    """By the program that forked them. Work: O(1) for each event, amortised; memory: those who
    wait, at most."""

    def __init__(self) -> None:
        self._gangs: dict[str, _Gang] = {}
        """The one that began first is the first; all wait equally long."""
        self._gang_of: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._gang_of)

    def __contains__(self, request_id: object) -> bool:
        """Whether it is kept back for the rest of its gang."""
        return request_id in self._gang_of

    def arrived(self, request: QueuedRequest, now_s: float) -> None:
        """`request` waits. One that has been admitted before is nobody's beginning."""
        name = request.parent_program
        if request.branches < 2 or not name or request.admitted_s is not None:
            return
        gang = self._gangs.get(name)
        if gang is None:
            gang = self._gangs[name] = _Gang(now_s + FORMING_S)
        gang.members.add(request.request_id)
        gang.n_came += 1
        self._gang_of[request.request_id] = name
        if gang.n_came >= request.branches:
            self._let_go(name)

    def left(self, request_id: int) -> None:
        """It does not wait any more."""
        name = self._gang_of.pop(request_id, None)
        if name is None:
            return
        members = self._gangs[name].members
        members.remove(request_id)
        if not members:
            del self._gangs[name]

    def expire(self, now_s: float) -> None:
        """Those whose rest has not come in time wait for it no longer."""
        for name in [name for name, gang in self._gangs.items() if gang.until_s <= now_s]:
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        for request_id in self._gangs.pop(name).members:
            del self._gang_of[request_id]
