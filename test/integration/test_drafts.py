"""Speculative decoding with a draft that has KV: answers and acceptance from every tier.

Guarantee: plain SGLang and `--tiered-kv` with the same draft say what is said without one; and as
many drafts are accepted after a hit in any tier, and after a restart, as when all was computed: the
draft found its own KV there. Two drafts: a model that drafts by itself (STANDALONE: the target,
so that all it says is accepted as long as its KV is right), and an EAGLE head made of the target's
first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from harness.client import Answer, generate_all
from harness.metrics import wait_for_disk
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.models import EAGLE_VOCABULARY, tiny_eagle_head, tiny_model_of_few_words

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1800)]

N_TOKENS = 300
N_REUSABLE = 288
N_NEW = 48
POOL = ("--max-total-tokens", 1024, "--chunked-prefill-size", 128, "--page-size", 16)
CHAIN = ("--speculative-num-steps", 3, "--speculative-eagle-topk", 1)
#: The tokenizer has more words than the model, which that for grammars does not take.
FEW_WORDS = ("--grammar-backend", "none")
#: More than all prompts take.
HOST = "5MB"


def told(answers: Sequence[Answer]) -> list[tuple[tuple[int, ...], int, int]]:
    """What was said, in how many passes, with how many drafts accepted."""
    meta = [answer.meta_info for answer in answers]
    return [
        (answer.output_ids, one["spec_verify_ct"], one["spec_num_correct_drafts"])
        for answer, one in zip(answers, meta, strict=True)
    ]


@pytest.fixture(scope="module")
def target(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_of_few_words(demo_model, tmp_path_factory.mktemp("drafts") / "target")


@pytest.mark.parametrize("algorithm", ["STANDALONE", "EAGLE"])
def test_every_tier_has_the_drafts_kv(
    make_server: Callable[..., Server], target: Path, tmp_path: Path, algorithm: str
) -> None:
    draft = target if algorithm == "STANDALONE" else tiny_eagle_head(target, tmp_path / "head")
    dice = Random(7)
    asked = [tuple(dice.randrange(3, EAGLE_VOCABULARY) for _ in range(N_TOKENS)) for _ in range(5)]
    speculates = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", draft]
    speculates += CHAIN

    def ask(server: Server, prompts: Sequence[tuple[int, ...]]) -> list[Answer]:
        return generate_all(server, prompts, N_NEW, concurrency=1)

    only_platform = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
    base = [*FLOAT32, *POOL, *FEW_WORDS, *speculates]
    with make_server(f"{algorithm}_plain", *base, model=target, env=only_platform) as plain:
        truths = told(ask(plain, asked))
    assert len({truth[0] for truth in truths}) == 5
    n_accepted = sum(truth[2] for truth in truths)
    assert n_accepted > 5 * N_NEW * 0.4

    tiers = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", HOST]
    tiers += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    args = [*base, *tiers, "--tiered-kv-debug-integrity", "--enable-metrics"]
    with make_server(f"{algorithm}_tiers", *args, model=target) as server:
        computed = ask(server, asked)
        from_device = ask(server, asked[-1:])
        from_host = ask(server, asked[:2])
        wait_for_disk(server)
        server.flush_cache()
        from_disk = ask(server, asked)
        at_once = generate_all(server, asked, N_NEW, concurrency=5)
        wait_for_disk(server)
    with make_server(f"{algorithm}_restarted", *args, model=target) as server:
        after_restart = ask(server, asked)

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.device for answer in from_device] == [N_REUSABLE]
    assert [answer.device + answer.host for answer in from_host] == [N_REUSABLE] * 2
    assert all(answer.host > N_REUSABLE // 2 for answer in from_host)
    for from_cold in (from_disk, after_restart):
        assert [answer.disk for answer in from_cold] == [N_REUSABLE] * 5
    assert told(computed) == truths
    assert told(from_device) == truths[-1:]
    assert told(from_host) == truths[:2]
    assert told(from_disk) == truths
    assert [answer.output_ids for answer in at_once] == [truth[0] for truth in truths]
    assert told(after_restart) == truths
