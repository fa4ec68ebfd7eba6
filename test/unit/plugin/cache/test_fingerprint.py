"""The namespace must change with anything that makes cached KV wrong, and with nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tiered_kv.plugin.cache.fingerprint import namespace_of, weights_checksum
from tiered_kv.tiers.page_format import PageFormat

PAGE = PageFormat.of_buffers(16, [0, 0], [64, 64])


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.LayerNorm(17))
    model.register_buffer("cos_sin_cache", torch.rand(5, 3))
    return model.to(dtype)


def name(
    model: torch.nn.Module,
    *,
    config: str = "{}",
    context_len: int = 128,
    dtype: torch.dtype = torch.float32,
    page_format: PageFormat = PAGE,
    shard: str = "0 of 1",
) -> bytes:
    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(to_json_string=lambda use_diff: config), context_len=context_len
    )
    pool = SimpleNamespace(dtype=dtype, store_dtype=dtype)
    return namespace_of(model, model_config, pool, page_format, shard)


def test_equal_models_have_equal_names_whatever_object_holds_them() -> None:
    assert name(make_model()) == name(make_model())


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


def test_everything_else_that_decides_about_reuse_is_part_of_the_name() -> None:
    plain = name(make_model())
    others = [
        name(make_model(seed=1)),
        name(make_model(dtype=torch.bfloat16)),
        name(make_model(), config='{"rope_theta": 1}'),
        name(make_model(), context_len=256),
        name(make_model(), dtype=torch.bfloat16),
        name(make_model(), page_format=PageFormat.of_buffers(32, [0, 0], [64, 64])),
        name(make_model(), shard="1 of 2"),
    ]
    assert len({plain, *others}) == 1 + len(others)
