"""Where conversations of benchmark/serving/multiturn_tiers.py are when their next turn comes."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import pytest

from benchmark.serving.conversations import Sample
from benchmark.serving.multiturn_tiers import LOADS, PLACES, Found, pool_sizes, row, shape_of


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152,
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return argparse.Namespace(
        conversations=3, history=768, page_size=64, dtype="float32", model_path=tmp_path
    )


class Lru:
    """Whole pages of conversations, the longest unused of which leave first."""

    def __init__(self, tokens: int) -> None:
        self._room = tokens
        self._pages: OrderedDict[object, int] = OrderedDict()

    def use(self, name: object, tokens: int) -> None:
        for page in range(tokens // 64):
            self._pages.pop((name, page), None)
            self._pages[name, page] = 64
        while sum(self._pages.values()) > self._room:
            self._pages.popitem(last=False)

    def has(self, name: object, tokens: int) -> int:
        return 64 * sum((name, page) in self._pages for page in range(tokens // 64))


@pytest.mark.parametrize("history", [512, 768, 1024])
def test_pools_put_conversations_where_they_are_to_be_found(
    options: argparse.Namespace, history: int
) -> None:
    options.history = history
    sizes = pool_sizes(options)
    tiers = Lru(sizes.device), Lru(sizes.host)
    shapes = {load: shape_of(load, options) for load in LOADS}

    def ask(name: tuple[str, int, str], turn: int) -> tuple[int, int]:
        found = tiers[0].has(name, history), tiers[1].has(name, history)
        for tier in tiers:
            tier.use(name, shapes[name[2]].prompt_tokens(turn))
        return found

    names = {place: [(place, n, load) for n in range(3) for load in LOADS] for place in PLACES}
    for place in ("disk", "restart", "host"):
        for name in names[place]:
            ask(name, 0)
    for name in names["device"]:
        ask(name, 0)
        assert ask(name, 1)[0] == history
    for name in names["host"]:
        assert ask(name, 1) == (0, history)
    for name in names["disk"]:
        assert ask(name, 1) == (0, 0)


def test_rows_compare_requests_with_the_same_one_on_plain_sglang() -> None:
    def found(number: int, system: str, ttft_s: float, answer: int) -> Found:
        sample = Sample(1, 1024, 768, 0, 768, 0, ttft_s, 2 * ttft_s, (answer,))
        return Found("host", "chat", number, system, sample)

    asked = [found(0, "plain", 1.0, 7), found(1, "plain", 3.0, 7)]
    asked += [found(0, "tiered", 0.5, 7), found(1, "tiered", 1.0, 8)]
    got = row(asked, "chat", "host", "tiered")
    assert (got["plain_by_ours"], got["equal"], got["host_tokens"]) == (2.5, 1, 1536)
