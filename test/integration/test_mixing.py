"""Decodes beside prompts on the real server: mixed where SGLang mixes, in turns where it does not.

Two answers are decoded while prompts of several chunks arrive. With log-probabilities SGLang mixes
nothing into a pass: whoever plans must know, or nobody gets a token while prompts wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmark.serving.streams import pieces
from harness.demo_model import host_size
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server

pytestmark = [pytest.mark.long, pytest.mark.server, pytest.mark.timeout(900)]

CHUNK, N_PROMPTS, PROMPT = 64, 6, 192
ANSWER = 120
MakeServer = Callable[..., Server]


class Decoding(threading.Thread):
    """An answer as it comes: when each token was there."""

    def __init__(self, server: Server, prompt: tuple[int, ...], *, logprobs: bool) -> None:
        super().__init__()
        self._url = server.url
        sampling = {"temperature": 0, "max_new_tokens": ANSWER, "ignore_eos": True}
        self._body: dict[str, Any] = {
            "input_ids": list(prompt),
            "sampling_params": sampling,
            "stream": True,
            "return_logprob": logprobs,
        }
        self.times_s: list[float] = []
        self.tokens: list[int] = []
        self.start()

    def run(self) -> None:
        for now_s, piece in pieces(self._url, self._body):
            n_new = piece["meta_info"]["completion_tokens"] - len(self.times_s)
            self.times_s += [now_s] * n_new
            self.tokens = piece["output_ids"]


def arrive(server: Server, prompts: PromptMaker, n: int, kind: bool, done_s: list[float]) -> None:
    """A prompt of its own; notes when its only token was there."""
    body = {
        "input_ids": list(prompts.tokens(f"prompt {n} {kind}", PROMPT)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        "stream": True,
    }
    done_s.append([now_s for now_s, _ in pieces(server.url, body)][-1])


@pytest.mark.parametrize("policy", ["slack", "niyama"])
def test_nobody_who_decodes_is_passed_over(
    make_server: MakeServer, prompts: PromptMaker, policy: str
) -> None:
    args = [
        *FLOAT32, "--page-size", 16, "--chunked-prefill-size", CHUNK, "--max-total-tokens", 4096,
        "--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(2048),
        "--tiered-kv-disk-dir", "none", "--tiered-kv-policy", policy, "--enable-mixed-chunk",
        "--tiered-kv-debug-integrity",
    ]  # fmt: skip
    said: dict[bool, list[list[int]]] = {}
    with make_server(f"mixing_{policy}", *args) as server:
        for logprobs in (False, True):
            decoding = [
                Decoding(server, prompts.tokens(f"stream {i}", 20), logprobs=logprobs and i == 0)
                for i in range(2)
            ]
            while not all(answer.times_s for answer in decoding):
                time.sleep(0.01)
            done_s: list[float] = []
            arriving = [
                threading.Thread(target=arrive, args=(server, prompts, n, logprobs, done_s))
                for n in range(N_PROMPTS)
            ]
            for thread in arriving:
                thread.start()
            for thread in (*arriving, *decoding):
                thread.join()
            first_s, last_s = min(done_s), max(done_s)
            for answer in decoding:
                meanwhile = sum(first_s < at_s < last_s for at_s in answer.times_s)
                # A prompt is three chunks; between two of them there is a decode at the least.
                assert meanwhile >= N_PROMPTS - 1, (logprobs, meanwhile)
                assert len(answer.times_s) == ANSWER
            said[logprobs] = [answer.tokens for answer in decoding]
    # Mixed or in turns: the same answers.
    assert said[True] == said[False]
