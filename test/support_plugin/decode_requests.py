"""Requests of all kinds for the KV model, and what plain SGLang says to each, one at a time."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from support_plugin.decode_loop import DecodeLoop, publish_arguments
from support_plugin.kv_model import VOCABULARY
from tiered_kv.api.slo import Slo
from tiered_kv.api.terms import Terms
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"


class Letters:
    """A tokenizer: each token is a letter."""

    eos_token_id = 0
    additional_stop_token_ids = None

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(_LETTERS[token] for token in tokens)

    def encode(self, text: str, **options: Any) -> list[int]:
        return [_LETTERS.index(letter) for letter in text]


class Rhyme(BaseGrammarObject):
    """Token i must be i modulo 3: whoever loses count says something else."""

    def __init__(self) -> None:
        super().__init__()
        self._n = 0

    def accept_token(self, token: int) -> None:
        if token % 3 != self._n % 3:
            raise ValueError(f"token {token} at {self._n}")
        self._n += 1

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: Any) -> torch.Tensor:
        return torch.zeros(batch_size, vocab_size)

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, idx: int) -> None:
        vocab_mask[idx] = -torch.inf
        vocab_mask[idx, self._n % 3 :: 3] = 0.0

    @staticmethod
    def move_vocab_mask(vocab_mask: torch.Tensor, device: Any) -> torch.Tensor:
        return vocab_mask

    @staticmethod
    def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        logits.add_(vocab_mask)


@dataclass(frozen=True, eq=False)
class Kind:
    """A request to be made, as often as one likes."""

    family: int
    """Those of one family begin alike."""
    seed: int
    n_own: int
    max_new_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)
    has_grammar: bool = False
    tbt_s: float | None = None
    has_logprobs: bool = False

    @property
    def prompt(self) -> array[int]:
        family, own = random.Random(self.family), random.Random(f"own {self.seed}")
        shared = [family.randrange(1, VOCABULARY) for _ in range(4 * self.family + 3)]
        return array("q", shared + [own.randrange(1, VOCABULARY) for _ in range(self.n_own)])

    def request(self, rid: str) -> Req:
        sampling = SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=0, **self.sampling
        )
        tokenizer = Letters()
        sampling.normalize(tokenizer)
        req = Req(
            rid, "", self.prompt, sampling, return_logprob=self.has_logprobs, vocab_size=VOCABULARY
        )
        req.tokenizer = tokenizer
        if self.has_grammar:
            req.grammar = Rhyme()
        req.tiered_kv_terms = Terms(slo=Slo(tbt_s=self.tbt_s))
        return req


_SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_eos": True},
    {"frequency_penalty": 0.8},
    {"presence_penalty": 1.2},
    {"repetition_penalty": 1.6},
    {"frequency_penalty": 0.4, "repetition_penalty": 1.3, "min_new_tokens": 8},
    {"min_new_tokens": 10},
    {"stop": ["k", "bd"]},
    {"logit_bias": {"5": 1.5, "11": -3.0}},
)


@cache
def kinds(n: int = 48) -> tuple[Kind, ...]:
    """Requests of several families, with and without penalties, grammar and stop strings."""
    dice = random.Random("kinds")
    return tuple(
        Kind(
            family=dice.randrange(4),
            seed=seed,
            n_own=dice.randint(1, 12),
            max_new_tokens=dice.randint(1, 20),
            sampling=_SAMPLING[seed % len(_SAMPLING)],
            has_grammar=seed % 7 == 3,
            tbt_s=dice.choice((None, None, 0.06)),
        )
        for seed in range(n)
    )


class Oracle:
    """Plain SGLang's answers to single requests, each asked for once."""

    def __init__(self, args: Any, *, overlap: bool) -> None:
        self._loop = DecodeLoop(args, overlap=overlap)
        self._known: dict[Kind, list[int]] = {}

    def answer(self, kind: Kind) -> list[int]:
        if kind not in self._known:
            req = kind.request(f"oracle {len(self._known)}")
            self._loop.serve(req)
            self._known[kind] = list(req.output_ids)
        return self._known[kind]

    def close(self) -> None:
        self._loop.close()


def light_costs() -> CostModel:
    """Predictions under which an iteration takes what its KV takes.

    Contexts are short here: as if they were long, some objectives allow few to decode at a time.
    """
    model = replace(
        find_model("SmolLM2-135M"), kv_bytes_per_element=60.0, weight_bytes_per_parameter=0.01
    )
    edges = ((Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST))
    return CostModel(model, find_device("CPU-2"), dict.fromkeys(edges, EdgeCost(1e12, 1e-5)))


__all__ = ["Kind", "Oracle", "kinds", "light_costs", "publish_arguments"]
