"""What models are made of: KV from every tier gives the answers of plain SGLang (docs/models.md).

Small random models in the shapes of real ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.prompts import PromptMaker
from support import models
from support.every_tier import WINDOW_FAULTS, Case, MakeServer, check_every_tier

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1800)]

CASES = (
    # A token of its latents takes 1,536 bytes, 128 floats on each of three layers.
    Case("latents", models.tiny_mla_model),
    Case("window", models.tiny_window_model, faults=WINDOW_FAULTS),
    Case("fp8_e4m3", models.tiny_model_for_two_ranks, ("--kv-cache-dtype", "fp8_e4m3")),
    Case("fp8_e5m2", models.tiny_model_for_two_ranks, ("--kv-cache-dtype", "fp8_e5m2")),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tier_gives_the_answers_of_plain_sglang(
    make_server: MakeServer, demo_model: Path, prompts: PromptMaker, tmp_path: Path, case: Case
) -> None:
    check_every_tier(case, make_server, demo_model, prompts, tmp_path)
