"""The namespace: 32 bytes that differ whenever cached KV must not be reused.

The model is named by its weights as they lie in memory, not by a path or a revision: that covers
another revision, a fine-tune under the same name, dummy weights, quantisation, the rank's shard,
and weights replaced at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tiered_kv.forest.key import namespace_hash
from tiered_kv.tiers.page_format import PageFormat

_CHUNK = 1 << 22


def namespace_of(
    model: torch.nn.Module, model_config: Any, pool: Any, page_format: PageFormat, shard: str
) -> bytes:
    """Names weights, configuration, KV dtype and byte layout, and the tensor-parallel shard.

    shard: e.g. "0 of 2". `model_config` is upstream's ModelConfig, `pool` its KV pool.
    """
    return namespace_hash(
        "model",
        weights_checksum(model),
        model_config.hf_config.to_json_string(use_diff=False),
        str(model_config.context_len),
        type(pool).__name__,
        str(pool.dtype),
        str(pool.store_dtype),
        page_format.fingerprint(),
        shard,
    )


def weights_checksum(model: torch.nn.Module) -> bytes:
    """32 bytes over every parameter and buffer (names, shapes, dtypes, contents) and KV scale.

    The contents enter through two 64-bit sums per tensor (plain, and weighted by position), which
    a device computes at memory speed. They catch any accidental difference; they are no defence
    against someone who forges weights, who could as well serve what he likes.
    """
    names: list[str] = [f"{name}|{value}" for name, value in _kv_scales(model)]
    sums: list[torch.Tensor] = []
    for name, tensor in sorted(_named_tensors(model), key=lambda item: item[0]):
        names.append(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}")
        sums.append(_content_sums(tensor))
    values = torch.stack([s.cpu() for s in sums]).numpy().tobytes() if sums else b""
    return namespace_hash("weights", *names, values)


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    for name, buffer in model.named_buffers():
        yield name, buffer.detach()


def _kv_scales(model: torch.nn.Module) -> Iterator[tuple[str, float]]:
    """The scales of an fp8 KV cache, which are plain numbers if they came from a file.

    (layers/radix_attention.py, and models that have load_kv_cache_scales)
    """
    for module_name, module in model.named_modules():
        for attribute in ("k_scale", "v_scale", "k_scale_float", "v_scale_float"):
            value = module.__dict__.get(attribute)
            if isinstance(value, float):
                yield f"{module_name}.{attribute}", value


def _content_sums(tensor: torch.Tensor) -> torch.Tensor:
    """(2,) int64, sums modulo 2**64, on the tensor's device."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for at in range(0, words.numel(), _CHUNK):
        chunk = words[at : at + _CHUNK].to(torch.int64)
        position = torch.arange(at + 1, at + 1 + chunk.numel(), device=tensor.device)
        total[0] += chunk.sum()
        total[1] += (chunk * position).sum()
    return total
