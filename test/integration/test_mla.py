"""Multi-head latent attention: its latents in all three tiers, with the answers of plain SGLang.

A small random model in the shape of DeepSeek-V2. A token takes 1,536 bytes, 128 floats on each of
three layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.prompts import PromptMaker
from support.every_tier import Case, MakeServer, check_every_tier
from support.models import tiny_mla_model

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)]


def test_latents_come_back_from_every_tier(
    make_server: MakeServer, demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    case = Case("mla", tiny_mla_model, host_size="4MB")
    check_every_tier(case, make_server, demo_model, prompts, tmp_path)
