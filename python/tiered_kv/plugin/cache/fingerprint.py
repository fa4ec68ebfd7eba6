"""The namespace: 32 bytes that differ whenever cached KV must not be reused.

Every part is derived from contents, never from a path, an id or a revision: the same weights are
found again wherever they lie, and others are not, whatever they are called. docs/naming.md lists
the parts, and what changes each.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tiered_kv.forest.key import namespace_hash
from tiered_kv.plugin.upstream.current import arguments
from tiered_kv.tiers.page_format import PageFormat

_CHUNK = 1 << 22

#: Of a model's configuration, what says nothing about how KV is computed: where it comes from, what
#: its library's callers want, the tokens at which generation ends, and what is a part of its own
#: here (the types; `context_len` is SGLang's, and matters through positions alone). All else
#: counts: of a field that nobody here knows, a miss is the safe answer.
SAYS_NOTHING = frozenset(
    {
        *("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version"),
        *("auto_map", "_attn_implementation", "_attn_implementation_autoset"),
        *("return_dict", "output_attentions", "output_hidden_states", "use_cache"),
        *("chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("dtype", "torch_dtype", "context_len"),
    }
)
#: Tables of positions have a row for each; how many there are is no matter of what the first say.
_POSITIONS_SUFFIX = "cos_sin_cache"
_POSITIONS_MAX = 1024


def namespace_of(parts: dict[str, str | bytes]) -> bytes:
    """The namespace that these parts name, each with its own name in front."""
    return namespace_hash("namespace", *(one for part in sorted(parts.items()) for one in part))


def parts_of(
    model: torch.nn.Module,
    model_config: Any,
    server_args: Any,
    pool: Any,
    page_format: PageFormat,
    *,
    weights: bytes,
    shard: str,
    release: str,
) -> dict[str, str | bytes]:
    """What KV depends on besides the request, by name.

    weights: `weights_checksum` of all ranks. shard: `KVShard.name`. release: the engine's.
    `model_config` is upstream's ModelConfig, `server_args` its ServerArgs, `pool` its KV pool.
    """
    return {
        "release": release,
        "weights": weights,
        "code": code_of(model),
        "config": config_of(model_config.hf_config),
        "compute type": f"{model_config.dtype} {model_config.quantization}",
        "numerics": numerics_of(server_args, model_config, pool),
        "pool": f"{type(pool).__name__} {pool.dtype} {pool.store_dtype}",
        "page format": page_format.fingerprint(),
        "shard": shard,
    }


def described(parts: dict[str, str | bytes]) -> str:
    """The parts for the log, each by a few digits: those of two starts tell what has changed."""
    return ", ".join(f"{name} {namespace_hash(part).hex()[:8]}" for name, part in parts.items())


def config_of(hf_config: Any) -> str:
    """The configuration as it is in effect (overrides included), less what says nothing."""
    config = json.loads(hf_config.to_json_string(use_diff=False))
    return json.dumps(_that_matters(config), sort_keys=True)


def _that_matters(config: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration and of those inside it. Other mappings (rope, quantisation) stay whole."""
    return {
        field: _that_matters(value) if isinstance(value, dict) and "model_type" in value else value
        for field, value in config.items()
        if field not in SAYS_NOTHING
    }


def code_of(model: torch.nn.Module) -> str:
    """The model's class, and versions and contents of files of code that is not SGLang's.

    SGLang can run models of transformers and of a user's own package, neither of which its release
    names.
    """
    modules = {type(module).__module__ for module in model.modules()}
    known = ("sglang", "torch", "tiered_kv", "sgl_kernel")
    files = []
    for name in sorted(modules):
        if name.partition(".")[0] not in known:
            try:
                source = inspect.getsource(sys.modules[name])
            except (OSError, TypeError, KeyError):
                source = ""
            version = getattr(sys.modules.get(name.partition(".")[0]), "__version__", "")
            files.append(f"{name} {version} {hashlib.sha256(source.encode()).hexdigest()}")
    return " ".join([f"{type(model).__module__}.{type(model).__qualname__}", *files])


def numerics_of(server_args: Any, model_config: Any, pool: Any) -> str:
    """Options that change the bytes of KV by more than rounding, or where rounding was ruled out.

    Attention backends round alike, as batches of other sizes do. But they differ in how they scale
    KV that is stored in fewer bits, and who asks for deterministic answers wants KV of that kind.
    """
    outcome = arguments.resolved(server_args)
    is_exact = outcome.enable_deterministic_inference
    text = f"deterministic {is_exact} {outcome.rl_on_policy_target}"
    if is_exact or pool.dtype.itemsize < model_config.dtype.itemsize:
        text += " by {} {}".format(*arguments.attention_backends(server_args))
    return text


def beyond_names(model_config: Any) -> str | None:
    """Why KV of this model depends on more than its parts and tokens, or None.

    Longrope (Phi-3, ...) has two sets of factors; SGLang takes the long one for a whole batch if
    anybody in it is beyond the original context.
    """
    text = model_config.hf_text_config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    original = rope.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", 0
    )
    if model_config.context_len <= original:
        return None
    return (
        f"with longrope, KV depends on who else is in a batch once contexts exceed {original} "
        f"tokens; start with --context-length {original} to have a disk tier"
    )


# -- weights -------------------------------------------------------------------------------------


def weights_checksum(model: torch.nn.Module) -> bytes:
    """32 bytes over every parameter and buffer (names, shapes, dtypes, contents) and KV scale.

    As they lie in memory: that covers a fine-tune under the same name, dummy weights,
    quantisation, the rank's shard, and weights replaced at run time. Whether layers are wrapped
    for LoRA does not count.

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


def weights_of_all(checksums: Sequence[bytes]) -> bytes:
    """A name of the whole model's weights, from the checksums of all ranks in order.

    What a rank computes depends on the others' weights as well.
    """
    return namespace_hash("ranks", *checksums)


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield _unwrapped(name), parameter.detach()
    for name, buffer in model.named_buffers():
        n_rows = _POSITIONS_MAX if name.endswith(_POSITIONS_SUFFIX) else None
        yield _unwrapped(name), buffer.detach()[:n_rows] if n_rows else buffer.detach()


def _unwrapped(name: str) -> str:
    return name.replace(".base_layer.", ".")


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
    if flat.storage_offset() % 4:  # part of another tensor: no whole words there
        flat = flat.clone()
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for at in range(0, words.numel(), _CHUNK):
        chunk = words[at : at + _CHUNK].to(torch.int64)
        position = torch.arange(at + 1, at + 1 + chunk.numel(), device=tensor.device)
        total[0] += chunk.sum()
        total[1] += (chunk * position).sum()
    return total
