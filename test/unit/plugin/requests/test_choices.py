"""What the choices of one prompt report as cached.

Guarantee: every choice says what was there before its request came, in all places that say it, and
no other request's answer changes. SGLang's side is its own `_handle_batch_request`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from support_plugin import on_release
from tiered_kv.plugin.requests import choices

HANDLE = getattr(TokenizerManager._handle_batch_request, "__wrapped__", None)
PAGE = 64


class Manager(TokenizerManager):
    """SGLang's handling of a batch over a server that caches every prompt it has seen."""

    def __init__(self, tiered_kv: bool = True) -> None:
        self.server_args = SimpleNamespace(tiered_kv=tiered_kv, enable_tokenizer_batch_encode=False)
        self.seen: dict[str, int] = {}
        self.rid_to_state: dict[str, Any] = {}
        self.streamed: dict[str, bool] = {}
        self.enable_trace = False

    async def _tokenize_one_request(self, obj: Any) -> Any:
        return SimpleNamespace(
            rid=obj.rid, stream=obj.stream, sampling_params=SimpleNamespace(max_new_tokens=4)
        )

    def _raise_if_logical_request_aborted(self, obj: Any) -> None:
        pass

    def _raise_if_logical_rid_aborted(self, rid: str) -> None:
        pass

    def _should_use_batch_tokenization(self, batch_size: int, requests: Any) -> bool:
        return False

    def _init_child_req_state(self, logical_rid: str, obj: Any, request: Any = None) -> None:
        self._init_req_state(obj)

    def _init_req_state(self, obj: Any, request: Any = None) -> None:
        self.rid_to_state[obj.rid] = SimpleNamespace(time_stats=None)

    def _remove_req_state(self, rid: str, lifecycle_id: Any = None) -> Any:
        return self.rid_to_state.pop(rid, None)

    def _send_one_request(self, tokenized_obj: Any) -> asyncio.Future[None]:
        """Waited for or not, as the release does."""
        self.streamed[tokenized_obj.rid] = tokenized_obj.stream
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent.set_result(None)
        return sent

    async def wait_one(self, obj: Any, request: Any = None) -> AsyncGenerator[Any, None]:
        found = self.seen.get(obj.text, 0)
        self.seen[obj.text] = 2 * PAGE
        report = json.dumps({"wait_ms": 1.0, "cached_tokens": {"device": found}})
        for reason in (None, {"type": "length", "tiered_kv": report}):
            details = {"device": found} if found else None
            meta = {"cached_tokens": found, "cached_tokens_details": details}
            if reason is None and not self.streamed[obj.rid]:
                continue
            yield {"meta_info": {**meta, "id": obj.rid, "finish_reason": reason}}

    def _wait_one_response(self, obj: Any, request: Any = None) -> AsyncGenerator[Any, None]:
        return choices.keep_accounts(Manager.wait_one, self, obj, request)

    def handle(self, obj: Any) -> list[dict[str, Any]]:
        """The `meta_info` of all answers."""

        async def all_of() -> list[dict[str, Any]]:
            for rid in obj.rid:
                self.rid_to_state[rid] = SimpleNamespace(
                    time_stats=SimpleNamespace(set_finished_time=lambda: None)
                )
            original = HANDLE or TokenizerManager._handle_batch_request
            found: list[dict[str, Any]] = []
            more = () if on_release.IS_0_5_17 else (None, dict(self.rid_to_state))
            async for answer in choices.open_accounts(original, self, obj, *more):
                several = answer if isinstance(answer, list) else [answer]
                found += [one["meta_info"] for one in several]
            return found

        return asyncio.run(all_of())


def asked(text: list[str], n: int, stream: bool = False) -> GenerateReqInput:
    obj = GenerateReqInput(text=text, sampling_params={"n": n}, stream=stream)
    obj.normalize_batch_and_arguments()
    return obj


def reported(meta: dict[str, Any]) -> Any:
    return json.loads(meta["finish_reason"]["tiered_kv"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_choices_say_what_their_request_found(stream: bool) -> None:
    manager = Manager()
    manager.seen["known"] = PAGE
    found = manager.handle(asked(["new", "known"], 3, stream))
    counts = sorted({one["id"]: one["cached_tokens"] for one in found}.values())
    assert counts == [0, 0, 0, PAGE, PAGE, PAGE]
    for meta in found:
        details = {"device": PAGE} if meta["cached_tokens"] else None
        assert meta["cached_tokens_details"] == details
        if meta["finish_reason"] is not None:
            assert reported(meta) == {
                "wait_ms": 1.0,
                "cached_tokens": {"device": meta["cached_tokens"]},
            }


def test_a_single_choice_says_what_it_found() -> None:
    manager = Manager()
    found = manager.handle(asked(["new", "new"], 1))
    assert [one["cached_tokens"] for one in found] == [0, 2 * PAGE]


def test_a_server_without_tiers_is_left_alone() -> None:
    found = Manager(tiered_kv=False).handle(asked(["new"], 2))
    assert [one["cached_tokens"] for one in found] == [2 * PAGE, 2 * PAGE]


def test_counts_that_an_answer_lacks_are_not_made_up() -> None:
    meta: dict[str, Any] = {"finish_reason": {"type": "abort"}}
    choices.say_as_first(meta, {"cached_tokens": 3, "finish_reason": None})
    assert meta == {"finish_reason": {"type": "abort"}}
