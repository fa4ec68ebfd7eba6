"""Names of adapters, on SGLang's own LoRAAdapter objects: by contents, and by nothing else."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from transformers import LlamaConfig

from support_tiers.doubles import BarrierMinimum
from tiered_kv.forest.key import TreeKey
from tiered_kv.plugin.cache import adapters
from tiered_kv.plugin.cache.adapters import AdapterNames, name_of
from tiered_kv.plugin.requests.salts import key_of, parts_of
from tiered_kv.tiers.transfer import SingleRank

BASE = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
    "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": False,
    "base_model_name_or_path": "/models/base",
}  # fmt: skip
#: SGLang's names of the modules of which it applies adapters.
MODULES = {"qkv_proj"}
_ids = itertools.count()


def tensors(seed: int = 0, *, embedding: bool = False) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    found = {}
    for layer, module in itertools.product(range(2), ("q_proj", "v_proj")):
        name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
        found[f"{name}.lora_A.weight"] = torch.randn(2, 8, generator=random)
        found[f"{name}.lora_B.weight"] = torch.randn(8, 2, generator=random)
    if embedding:
        name = "base_model.model.model.embed_tokens"
        found[f"{name}.lora_embedding_A"] = torch.randn(2, 16, generator=random)
    return found


def adapter(weights: dict[str, torch.Tensor] | None = None, **config: Any) -> LoRAAdapter:
    about = LoRAConfig.from_dict({**CONFIG, **config})
    made = LoRAAdapter(f"id {next(_ids)}", about, BASE, None, None)
    made.initialize_weights_from_tensors(tensors() if weights is None else weights)
    return made


def manager(modules: set[str] = MODULES, **loras: LoRAAdapter) -> Any:
    return SimpleNamespace(loras=loras, target_modules=modules, experts_shared_outer_loras=False)


def name(found: LoRAAdapter, modules: set[str] = MODULES) -> bytes:
    return name_of(found, manager(modules))


# -- names -------------------------------------------------------------------------------------


def test_the_same_contents_have_the_same_name_whoever_loaded_them() -> None:
    one, other = adapter(), adapter()
    assert one.uid != other.uid
    assert name(one) == name(other)


@pytest.mark.parametrize(
    "config",
    [{"lora_alpha": 8}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 1}}, {"new": "option"}],
)
def test_configuration_counts(config: dict[str, Any]) -> None:
    assert name(adapter(**config)) != name(adapter())


@pytest.mark.parametrize(
    "config",
    [
        {"base_model_name_or_path": "/elsewhere"},
        {"inference_mode": True},
        {"target_modules": ["v_proj", "q_proj"]},
    ],
)
def test_where_it_comes_from_does_not(config: dict[str, Any]) -> None:
    assert name(adapter(**config)) == name(adapter())


def test_every_weight_counts() -> None:
    plain = name(adapter())
    assert name(adapter(tensors(seed=1))) != plain
    for tensor in tensors():
        weights = tensors()
        weights[tensor].view(torch.int32)[-1, -1] ^= 1
        assert name(adapter(weights)) != plain, tensor
    assert name(adapter({k: v.bfloat16() for k, v in tensors().items()})) != plain


def test_weights_of_embeddings_count_if_they_are_applied() -> None:
    targets = [*CONFIG["target_modules"], "embed_tokens"]
    with_embedding = adapter(tensors(embedding=True), target_modules=targets)
    without = adapter(target_modules=targets)
    assert name(with_embedding, MODULES) == name(without, MODULES)
    applied = MODULES | {"embed_tokens"}
    assert name(with_embedding, applied) != name(without, applied)


def test_what_the_server_could_apply_besides_does_not_count() -> None:
    assert name(adapter(), MODULES | {"down_proj"}) == name(adapter())


# -- the table of a rank -----------------------------------------------------------------------


def test_an_id_means_what_was_loaded_under_it_last() -> None:
    ours = manager(a=adapter())
    names = AdapterNames(ours, SingleRank())
    first = names.key_of("a")
    assert first == TreeKey(adapter=name(adapter()))
    ours.loras["a"] = adapter(tensors(seed=1))
    names.changed("a")
    assert names.key_of("a").adapter == name(adapter(tensors(seed=1))) != first.adapter
    ours.loras["b"] = adapter()
    names.changed("b")
    assert names.key_of("b") == first, "the same contents, loaded again under another id"


def test_an_id_that_nothing_was_loaded_under_shares_with_nobody() -> None:
    ours = manager(a=adapter())
    names = AdapterNames(ours, SingleRank())
    del ours.loras["a"]
    names.changed("a")
    for lora_id in ("a", "b"):
        one, other = names.key_of(lora_id), names.key_of(lora_id)
        assert one != other
        assert not one.is_lasting
    assert AdapterNames(None, SingleRank()).key_of("a").is_lasting is False


def test_contents_that_cannot_be_read_have_a_name_for_this_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unreadable = adapter()
    unreadable.layers[1].weights["x.qkv_proj.lora_A"] = torch.empty(2, 2, device="meta")
    names = AdapterNames(manager(a=unreadable), SingleRank())
    key = names.key_of("a")
    assert key == names.key_of("a")
    assert not key.is_lasting
    assert "stays above the disk" in caplog.text
    assert AdapterNames(manager(a=unreadable), SingleRank()).key_of("a") != key


@pytest.mark.parametrize("second", [0, 1, None])
def test_ranks_that_read_different_contents_give_it_no_lasting_name(second: int | None) -> None:
    """What a rank has found, all must have found: otherwise one runs what another skips."""
    barrier = BarrierMinimum(2)
    loras = [{"a": adapter()}, {} if second is None else {"a": adapter(tensors(seed=second))}]
    keys: list[TreeKey] = [TreeKey(), TreeKey()]

    def rank(index: int) -> None:
        names = AdapterNames(manager(), barrier.rank(index))
        names._manager.loras.update(loras[index])
        names.changed("a")
        keys[index] = names.key_of("a")

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [key.is_lasting for key in keys] == [second == 0] * 2
    assert (keys[0] == keys[1]) == (second == 0)


# -- requests ----------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> Iterator[Any]:
    """Makes this process the scheduler of a server of ours, with the adapter `a`."""
    ours = manager(a=adapter())
    adapters.track(AdapterNames(ours, SingleRank()))
    yield ours
    adapters._names = None


def made(extra_key: str | None, lora_id: str | None = None) -> Any:
    req = Req("r", "", array("q", [1]), SamplingParams(), extra_key=extra_key, lora_id=lora_id)
    adapters.name_tree(None, req)
    adapters.name_tree(None, req)
    return req.extra_key


def test_a_request_has_its_parts_apart(scheduler: Any) -> None:
    salt, key = parts_of(key_of("s", "k"))
    contents = name(adapter())
    assert made(None) is None
    assert made(key_of("s", "k")) == TreeKey(salt, key)
    assert made(None, "a") == TreeKey(adapter=contents)
    assert made(key_of("s", None), "a") == TreeKey(salt, adapter=contents)


def test_a_salt_in_a_field_of_its_own_is_in_the_name(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    salt, key = parts_of(key_of("s", "k"))
    monkeypatch.setattr(adapters.request_kv, "separate_salt", lambda req: "s")
    assert made(None) == TreeKey(salt)
    assert made(key_of(None, "k")) == TreeKey(salt, key)
    assert made(None, "a") == TreeKey(salt, adapter=name(adapter()))
    both = made(key_of("other", None))
    assert both.salt not in (salt, made(key_of("s", None)).salt, parts_of(key_of("other", None))[0])


@pytest.mark.parametrize("text", ["a", "ka", ""])
def test_no_key_spells_an_adapter(scheduler: Any, text: str) -> None:
    of_adapter = {made(None, "a"), made(key_of(None, "k"), "a")}
    for key in (text, key_of(None, text), key_of(text, None), key_of(text, "a")):
        assert made(key) not in of_adapter


def test_a_request_keeps_the_contents_that_it_began_with(scheduler: Any) -> None:
    before = made(None, "a")
    scheduler.loras["a"] = adapter(tensors(seed=1))
    adapters.after_change(None, None, SimpleNamespace(lora_id="a"))
    assert made(None, "a") != before


def test_another_servers_requests_keep_their_keys() -> None:
    assert made("k", "a") == "ka"
