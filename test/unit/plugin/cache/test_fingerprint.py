"""The namespace must change with anything that makes cached KV wrong, and with nothing else."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2VLConfig

from support import tiny_llama
from tiered_kv.plugin.cache import fingerprint
from tiered_kv.plugin.cache.fingerprint import weights_checksum, weights_of_all
from tiered_kv.tiers.page_format import PageFormat

PAGE = PageFormat.of_buffers(16, [0, 0], [64, 64])


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.LayerNorm(17))
    model.register_buffer("mask", torch.rand(5, 3))
    return model.to(dtype)


@dataclasses.dataclass
class Start:
    """What a server's start says about its KV; a test changes one thing."""

    model: torch.nn.Module = dataclasses.field(default_factory=make_model)
    config: Any = dataclasses.field(default_factory=lambda: LlamaConfig(num_hidden_layers=2))
    context_len: int = 128
    dtype: torch.dtype = torch.float32
    quantization: str | None = None
    kv_dtype: torch.dtype = torch.float32
    page_format: PageFormat = PAGE
    shard: str = "KV shard 0 of 1"
    release: str = "0.5.17"
    deterministic: bool = False
    on_policy: str | None = None
    backends: tuple[str, str] = ("triton", "triton")

    def name(self) -> bytes:
        self.config.context_len = self.context_len  # as SGLang does it
        server_args = SimpleNamespace(
            enable_deterministic_inference=self.deterministic,
            rl_on_policy_target=self.on_policy,
            get_attention_backends=lambda: self.backends,
            prefill_attention_backend=self.backends[0],
            decode_attention_backend=self.backends[1],
        )
        parts = fingerprint.parts_of(
            self.model,
            SimpleNamespace(
                hf_config=self.config, dtype=self.dtype, quantization=self.quantization
            ),
            server_args,
            SimpleNamespace(dtype=self.kv_dtype, store_dtype=self.kv_dtype),
            self.page_format,
            weights=weights_of_all([weights_checksum(self.model)]),
            shard=self.shard,
            release=self.release,
        )
        return fingerprint.namespace_of(parts)


def start(**changes: Any) -> Start:
    return dataclasses.replace(Start(), **changes)


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=2, **changes)


MISSES: dict[str, Callable[[], Start]] = {
    "weights": lambda: start(model=make_model(seed=1)),
    "type of weights": lambda: start(model=make_model(dtype=torch.bfloat16)),
    "rope": lambda: start(config=llama(rope_parameters={"rope_type": "linear", "factor": 2.0})),
    "a field nobody here knows": lambda: start(config=llama(new_attention="yes")),
    "architecture": lambda: start(config=llama(architectures=["LlamaForCausalLM"])),
    "quantisation in the config": lambda: start(
        config=llama(quantization_config={"quant_method": "fp8", "dtype": "e4m3"})
    ),
    "compute type": lambda: start(dtype=torch.bfloat16),
    "quantisation option": lambda: start(quantization="fp8"),
    "KV type": lambda: start(kv_dtype=torch.bfloat16),
    "page size": lambda: start(page_format=PageFormat.of_buffers(32, [0, 0], [64, 64])),
    "page format": lambda: start(page_format=dataclasses.replace(PAGE, encoding=b"fp8")),
    "shard": lambda: start(shard="KV shard 1 of 2"),
    "engine's release": lambda: start(release="0.5.18"),
    "deterministic": lambda: start(deterministic=True),
    "on-policy target": lambda: start(on_policy="fsdp"),
}

HITS: dict[str, Callable[[], Start]] = {
    "the same again": start,
    "another folder": lambda: start(config=llama(name_or_path="/elsewhere/llama")),
    "another library": lambda: start(config=llama(transformers_version="9.9")),
    "remote code's address": lambda: start(config=llama(auto_map={"AutoConfig": "me/repo--x.C"})),
    "end of generation": lambda: start(config=llama(eos_token_id=[7, 8], pad_token_id=9)),
    "labels": lambda: start(config=llama(id2label={0: "x"})),
    "type of the checkpoint": lambda: start(config=llama(dtype="bfloat16")),
    "context length": lambda: start(context_len=64),
    "attention backend": lambda: start(backends=("fa3", "flashinfer")),
}


@pytest.mark.parametrize("what", MISSES)
def test_a_miss(what: str) -> None:
    assert MISSES[what]().name() != Start().name()


@pytest.mark.parametrize("what", HITS)
def test_a_hit(what: str) -> None:
    assert HITS[what]().name() == Start().name()


def test_every_field_of_a_start_is_tried() -> None:
    """A part that is added to `Start` without a line above would be tested by nobody."""
    tried = {
        field.name
        for make in (*MISSES.values(), *HITS.values())
        for field in dataclasses.fields(Start)
        if field.name not in ("model", "config")
        and getattr(make(), field.name) != getattr(Start(), field.name)
    }
    assert tried == {field.name for field in dataclasses.fields(Start)} - {"model", "config"}


@pytest.mark.parametrize("changes", [{"kv_dtype": torch.float8_e4m3fn}, {"deterministic": True}])
def test_backends_count_where_they_scale_kv_or_rounding_matters(changes: dict[str, Any]) -> None:
    one, other = start(**changes), start(backends=("fa3", "flashinfer"), **changes)
    assert one.name() != other.name()


def test_configurations_inside_a_configuration_are_read_alike() -> None:
    def nested(**text: Any) -> Start:
        config = Qwen2VLConfig()
        for field, value in text.items():
            setattr(config.text_config, field, value)
        return start(config=config)

    plain = nested().name()
    assert nested(_name_or_path="/elsewhere", dtype="bfloat16", bos_token_id=5).name() == plain
    assert nested(hidden_size=7).name() != plain


def test_code_from_outside_the_engine_is_named_by_its_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(source: str, version: str) -> bytes:
        path = tmp_path / f"{abs(hash((source, version)))}.py"
        path.write_text(source)
        module = types.ModuleType("somebodys_model")
        module.__file__ = str(path)
        module.__version__ = version  # type: ignore[attr-defined]
        exec(compile(source, str(path), "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, "somebodys_model", module)
        torch.manual_seed(0)
        return start(model=module.Model(2, 2)).name()

    source = "import torch\nclass Model(torch.nn.Linear):\n    scale = 1\n"
    plain = name(source, "1")
    assert name(source, "1") == plain
    assert name(source.replace("scale = 1", "scale = 2"), "1") != plain
    assert name(source, "2") != plain


def test_how_many_positions_a_table_has_is_no_matter_of_what_it_says() -> None:
    def checksum(n_rows: int, base: float = 1.0) -> bytes:
        model = torch.nn.Module()
        model.register_buffer("cos_sin_cache", base * torch.arange(2.0 * n_rows).reshape(n_rows, 2))
        return weights_checksum(model)

    assert checksum(2048) == checksum(4096)
    assert checksum(2048) != checksum(2048, base=2.0)


def test_layers_wrapped_for_adapters_have_the_same_weights() -> None:
    class Wrapper(torch.nn.Module):
        """As SGLang's BaseLayerWithLoRA, whose subclasses may repeat the weight."""

        def __init__(self, base_layer: torch.nn.Module, *, repeats: bool) -> None:
            super().__init__()
            self.base_layer = base_layer
            if repeats:
                self.weight = base_layer.weight

    plain = weights_checksum(make_model())
    for repeats in (False, True):
        model = make_model()
        assert isinstance(model, torch.nn.Sequential)
        model[0] = Wrapper(model[0], repeats=repeats)
        assert weights_checksum(model) == plain


def test_weights_of_any_rank_count() -> None:
    ranks = [bytes([rank]) * 32 for rank in range(4)]
    whole = weights_of_all(ranks)
    assert whole == weights_of_all(list(ranks))
    assert whole != weights_of_all([*ranks[:3], bytes(32)])
    assert whole != weights_of_all(ranks[::-1])


def test_longrope_has_no_name_once_contexts_may_change_its_factors() -> None:
    def reason(context_len: int, **config: Any) -> str | None:
        text = SimpleNamespace(**config)
        return fingerprint.beyond_names(
            SimpleNamespace(hf_text_config=text, context_len=context_len)
        )

    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    assert reason(4096, rope_parameters=rope) is None
    assert "--context-length 4096" in str(reason(8192, rope_parameters=rope))
    old = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}
    assert reason(4096, **old) is None
    assert reason(8192, **old) is not None
    assert reason(8192, rope_parameters={"rope_type": "yarn"}) is None
    assert reason(8192) is None


def test_one_changed_bit_in_any_tensor_changes_the_name() -> None:
    plain = weights_checksum(make_model())
    for index in range(5):
        model = make_model()
        tensor = [*model.parameters(), *model.buffers()][index].detach()
        tensor.view(torch.int32).view(-1)[-1] ^= 1
        assert weights_checksum(model) != plain, index


def test_moving_a_value_within_a_tensor_changes_the_name() -> None:
    model = make_model()
    weight = model[0].weight.detach()
    weight[[0, 1]] = weight[[1, 0]].clone()
    assert weights_checksum(model) != weights_checksum(make_model())


def test_kv_scales_that_are_plain_numbers_count() -> None:
    model = make_model()
    model[1].k_scale = 0.5
    other = make_model()
    other[1].k_scale = 0.25
    names = {weights_checksum(m) for m in (make_model(), model, other)}
    assert len(names) == 3


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)])
def test_tensors_whose_bytes_are_no_multiple_of_four_count_too(shape: tuple[int, ...]) -> None:
    def with_tail(value: float) -> torch.nn.Module:
        model = torch.nn.Module()
        tail = torch.zeros(shape, dtype=torch.bfloat16)
        tail.view(-1)[-1] = value
        model.register_buffer("tail", tail)
        return model

    assert weights_checksum(with_tail(1.0)) != weights_checksum(with_tail(2.0))


def test_where_a_tensor_lies_is_no_matter() -> None:
    def checksum(offset: int) -> bytes:
        model = torch.nn.Module()
        whole = torch.zeros(offset + 8, dtype=torch.uint8)
        whole[offset:] = torch.arange(8)
        model.register_buffer("part", whole[offset:])
        return weights_checksum(model)

    assert checksum(0) == checksum(1) == checksum(4)


def test_sglangs_own_configuration_of_a_model_that_was_moved(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    def config(folder: str, **args: Any) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tiny_llama.write_config(tmp_path / folder)
        return fingerprint.config_of(ModelConfig(path, **args).hf_config)

    plain = config("here")
    assert config("there") == plain
    assert config("here", context_length=512) == plain
    assert config("here", model_override_args='{"rope_theta": 5.0}') != plain
    assert "here" not in plain
