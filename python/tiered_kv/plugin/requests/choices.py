"""What the choices of one prompt report as cached: what was there before their request came.

With `n` above 1 SGLang first computes the prompt in a pass of no new tokens, and then sends the
choices, each of which finds the whole prompt on the device. They would report as cached, and
OpenAI's `usage` with them, what their own request has just computed and is charged for. So all of
them say what that first pass found.

SGLang's objects for the passes over a prompt are shallow copies of one, hence an account that hangs
there is common to them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from tiered_kv.api.report import NAMESPACE

ACCOUNT = "tiered_kv_first_pass"
"""A dict at each prompt's object: empty until the first pass is over, then its `meta_info`."""

_COUNTS = ("cached_tokens", "cached_tokens_details")
_REPORTED = "cached_tokens"


def open_accounts(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    """AROUND `TokenizerManager._handle_batch_request`, which every request with choices reaches."""
    ours = getattr(manager.server_args, "tiered_kv", False)
    if ours and getattr(obj, "parallel_sample_num", 1) > 1:
        for index in range(obj.batch_size):
            setattr(obj[index], ACCOUNT, {})
    answers: AsyncGenerator[Any, None] = original(manager, obj, *args, **kwargs)
    return answers


def keep_accounts(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncGenerator[Any, None]:
    """AROUND `TokenizerManager._wait_one_response`: of a first pass, or of a choice."""
    answers: AsyncGenerator[Any, None] = original(manager, obj, request)
    account = getattr(obj, ACCOUNT, None)
    return answers if account is None else _accounted(answers, account)


async def _accounted(
    answers: AsyncGenerator[Any, None], account: dict[str, Any]
) -> AsyncGenerator[Any, None]:
    is_first_pass = not account
    try:
        async for answer in answers:
            if is_first_pass:
                account.update(answer["meta_info"])
            else:
                say_as_first(answer["meta_info"], account)
            yield answer
    finally:
        await answers.aclose()


def say_as_first(meta_info: dict[str, Any], first: dict[str, Any]) -> None:
    """Put the first pass's counts of cached tokens in place of a choice's, its report included."""
    for name in _COUNTS:
        if name in meta_info:
            meta_info[name] = first.get(name)
    own, of_first = _report_in(meta_info), _report_in(first)
    if own is not None and of_first is not None:
        own[_REPORTED] = of_first[_REPORTED]
        meta_info["finish_reason"][NAMESPACE] = json.dumps(own)


def _report_in(meta_info: dict[str, Any]) -> dict[str, Any] | None:
    text = (meta_info.get("finish_reason") or {}).get(NAMESPACE)
    return None if text is None else dict(json.loads(text))
