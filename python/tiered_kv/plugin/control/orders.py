"""Has the schedulers carry out an order, round by round; one order of a server at a time."""

from __future__ import annotations

import asyncio
import time
import uuid
from array import array
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from tiered_kv.api.cache_order import CacheOrder, merged
from tiered_kv.plugin.control import messages
from tiered_kv.plugin.requests.salts import key_of
from tiered_kv.plugin.snapshots.endpoint import Refusal

#: What transfers of one order may take; what has not come then is left.
ORDER_S = 30.0
#: Rounds that an order may have after that.
LATE_ROUNDS_MAX = 100_000
#: How long a caller waits: a forward pass on a CPU takes seconds, and others may come first.
PATIENCE_S = 120.0
#: Orders that wait for the one under way.
WAITING_MAX = 16
#: Between two rounds of an order that waits for a transfer.
PAUSE_S = 0.01

TOO_MANY = f"{WAITING_MAX} orders wait already; send this one again when they are done."
BUSY = (
    f"The order is not done after {PATIENCE_S:.0f} s: the scheduler computes long forward passes, "
    "or hangs; it goes on all the same, inspect what became of it."
)
GIVEN_UP = "The scheduler has given the order up for others; send it again."
NO_SESSION = (
    "No session of that name is remembered: none of its requests has ended lately, or they named "
    "another session or tenant."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What an order is about, but for a session: tokens, and the id of an adapter."""

    tokens: array[int] | None = None
    lora_id: str | None = None


class Orders:
    """Orders for the schedulers of one tokenizer manager."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._turn = asyncio.Lock()
        self._n_open = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def carry_out(self, order: CacheOrder, subject: Subject) -> dict[str, Any]:
        """What was done. Raises Refusal."""
        if self._n_open > WAITING_MAX:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, TOO_MANY)
        self._n_open += 1
        # Not cancelled with its caller: it is to be ended on all ranks.
        task = asyncio.create_task(self._in_turn(order, subject))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.wait_for(asyncio.shield(task), PATIENCE_S)
        except TimeoutError:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, BUSY) from None

    async def _in_turn(self, order: CacheOrder, subject: Subject) -> dict[str, Any]:
        try:
            async with self._turn:
                return await self._carry_out(order, subject)
        finally:
            self._n_open -= 1

    async def _carry_out(self, order: CacheOrder, subject: Subject) -> dict[str, Any]:
        name, tokens = uuid.uuid4().hex, subject.tokens
        for at in range(0, 0 if tokens is None else len(tokens), messages.TOKENS_MAX):
            assert tokens is not None
            part = tokens[at : at + messages.TOKENS_MAX]
            await self._ask({"order": name, "step": messages.PROMPT}, part)
        try:
            _check(
                await self._ask({"order": name, "step": messages.BEGIN, **_told(order, subject)})
            )
            outcomes = await self._rounds(name)
        finally:
            await self._ask({"order": name, "step": messages.END})
        if order.session_id is not None and not any(outcome["prompts"] for outcome in outcomes):
            raise Refusal(HTTPStatus.NOT_FOUND, NO_SESSION)
        done = merged(outcomes, is_session=order.session_id is not None)
        return {"action": order.action, **done}

    async def _rounds(self, name: str) -> list[dict[str, Any]]:
        end_s, n_late = time.monotonic() + ORDER_S, 0
        while n_late < LATE_ROUNDS_MAX:
            is_late = time.monotonic() > end_s
            n_late += is_late
            answers = await self._ask({"order": name, "step": messages.ROUND, "is_late": is_late})
            _check(answers)
            states = {answer["state"] for answer in answers}
            if states == {messages.DONE}:
                return [answer["outcome"] for answer in answers]
            if messages.MORE not in states:
                await asyncio.sleep(PAUSE_S)
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, BUSY)

    async def _ask(
        self, fields: dict[str, Any], tokens: array[int] | None = None
    ) -> list[dict[str, Any]]:
        """The word of each replica."""
        from sglang.srt.managers.io_struct import GetInternalStateReq

        manager = self._manager
        manager.auto_create_handle_loop()
        ask = manager.get_internal_state_communicator
        answers = await ask(GetInternalStateReq(rid=messages.written(fields, tokens)))
        return [answer.internal_state[messages.ANSWER_KEY] for answer in answers]


def _told(order: CacheOrder, subject: Subject) -> dict[str, Any]:
    key = key_of(order.cache_salt, order.extra_key)
    return {
        "action": order.action,
        "tier": (order.tier or "host").upper(),
        "tenant": order.tenant,
        "seconds": order.seconds,
        "session": order.session_id,
        "key": None if key is None else str(key),
        "lora_id": subject.lora_id,
    }


def _check(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        if answer["state"] == messages.REFUSED:
            raise Refusal(HTTPStatus.CONFLICT, answer["why"])
        if answer["state"] == messages.UNKNOWN:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, GIVEN_UP)
