"""Prefills what of a prompt is there, while its caller fetches the rest.

As a request like any other, by the route that will take the whole: so it has the caller's tenant,
salt and adapter, and its KV is found by whatever goes on from it. It has the least urgent class and
asks for one token, which nobody reads.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from http import HTTPStatus
from typing import Any

from starlette.types import Scope

from tiered_kv.api.pieces import TOKEN_BYTES, Prompt
from tiered_kv.plugin.prompts.inner import answer_of
from tiered_kv.plugin.requests.adapter import AHEAD_KEY

logger = logging.getLogger(__name__)

_ONE_TOKEN: dict[str, dict[str, object]] = {
    "messages": {"max_tokens": 1, "max_completion_tokens": None},
    "prompt": {"max_tokens": 1},
}
_OF_GENERATE: dict[str, object] = {"sampling_params": {"max_new_tokens": 1}}
#: What an answer would be like is of no use to it, or costs something.
_OF_ANSWERS = (
    *("stream", "stream_options", "n", "best_of", "logprobs", "top_logprobs", "response_format"),
    *("return_logprob", "return_hidden_states", "session_params", "hints", "sampling_params"),
    *("session_id", "program_id", "nvext", "echo", "min_tokens", "ebnf", "regex"),
    *("custom_params", "custom_logit_processor"),
)


class Ahead:
    """The prefill of one prompt: one request at a time, the newest pieces in each."""

    def __init__(self, prompt: Prompt, manager: Any, page_size: int) -> None:
        self._prompt = prompt
        self._page_size = page_size
        self._manager = manager
        self._task: asyncio.Task[None] | None = None
        self._rid = ""
        self._asked_bytes = 0
        """How much of it was there when it was last asked for."""
        self.prefilled_tokens = 0
        self.refused: str | None = None
        """Why the prompt so far is none that the route takes."""

    def go_on(self, scope: Scope) -> None:
        """Something came. scope: of who sent it. Less than a page is left for the next time."""
        n_new = self._prompt.n_bytes - self._asked_bytes
        if n_new < self._page_size * TOKEN_BYTES or self._is_busy():
            return
        self._task = asyncio.create_task(self._prefill(scope))

    def replaced(self) -> None:
        """What is being prefilled is not the prompt's beginning any more."""
        self.stop()
        self._asked_bytes = 0

    def leave(self) -> None:
        """The whole is asked for: nothing more is asked here, and what is under way goes on.

        The policy has the whole wait for a pass that computes its beginning, and overtake one that
        has not begun.
        """
        self._task = None

    def stop(self) -> None:
        """Whatever is computed by then stays in the cache."""
        if self._is_busy():
            self._manager.abort_request(self._rid)
        self._task = None

    def _is_busy(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _prefill(self, scope: Scope) -> None:
        prompt, version = self._prompt, self._prompt.version
        self._asked_bytes = prompt.n_bytes
        self._rid = f"tiered-kv-prompt-{secrets.token_hex(16)}"
        body = {key: value for key, value in prompt.request({}).items() if key not in _OF_ANSWERS}
        one_token = _ONE_TOKEN.get(prompt.form.field, _OF_GENERATE)
        if prompt.form.unit == "tokens":
            # What is on a page that is not full would be computed again.
            whole = len(prompt.content) // self._page_size * self._page_size
            body[prompt.form.field] = prompt.content[: whole or len(prompt.content)]
        body |= {**one_token, "rid": self._rid}
        try:
            status, answer = await answer_of(scope, prompt.form.path, body, **{AHEAD_KEY: True})
        except Exception:
            logger.exception("Tiered KV: a prompt that arrives in pieces was not prefilled ahead.")
            return
        if self._task is not asyncio.current_task():
            return  # stopped
        if status == HTTPStatus.OK:
            self.refused, self.prefilled_tokens = None, _prompt_tokens(answer)
        else:
            self.refused = _sentence(answer) or f"the route answered with status {status}."
        self._task = None
        if prompt.version != version:
            self.go_on(scope)


def _prompt_tokens(answer: Any) -> int:
    meta = answer.get("usage") or answer.get("meta_info") or {}
    return int(meta.get("prompt_tokens") or 0)


def _sentence(answer: Any) -> str | None:
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    found = error.get("message") if isinstance(error, dict) else error or answer.get("message")
    return str(found)[:400] if found else None
