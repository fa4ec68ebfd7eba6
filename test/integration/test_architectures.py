"""Architectures that people serve: KV from every tier gives the answers of plain SGLang.

Tiny random models of transformers' own classes (docs/models.md), in the shapes whose bytes
`contract/test_model_kv.py` counts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from harness.prompts import PromptMaker
from support.every_tier import WINDOW_FAULTS, Case, MakeServer, check_every_tier
from support.tiny_architectures import VOCABULARY, tiny
from support.workload import OfFewWords

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1800)]

#: The tokenizer has more words than the models, which that for grammars does not take.
FEW_WORDS = ("--grammar-backend", "none")
#: What SGLang serves with no other attention that a CPU has: the platform has it under this name.
TRITON = ("--attention-backend", "triton")


def case(architecture: str, *args: object, faults: tuple[str, ...] = ("corrupt_host",)) -> Case:
    return Case(architecture, partial(tiny, architecture), (*FEW_WORDS, *args), faults)


CASES = (
    case("Qwen3ForCausalLM"),
    case("Qwen3MoeForCausalLM"),
    case("GptOssForCausalLM", *TRITON, faults=WINDOW_FAULTS),
    case("DeepseekV3ForCausalLM"),
    case("MistralForCausalLM"),
    case("Gemma2ForCausalLM", faults=WINDOW_FAULTS),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tier_gives_the_answers_of_plain_sglang(
    make_server: MakeServer, demo_model: Path, prompts: PromptMaker, tmp_path: Path, case: Case
) -> None:
    check_every_tier(case, make_server, demo_model, OfFewWords(prompts, VOCABULARY), tmp_path)
