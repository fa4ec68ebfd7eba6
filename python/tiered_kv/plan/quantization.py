"""Bits of a weight by `quantization_config`: of the quantised ones, and which are not.

Scales and zero points are counted where there is one per group of weights; those per row or matrix
are less than a thousandth.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tiered_kv.core.errors import ConfigError

_PLAIN = 16.0
_MXFP4 = 4 + 8 / 32

# What stands before "layers" differs between checkpoints and versions of the library.
_FRONT = re.compile(r"^(?:(?:model|language_model|thinker|transformer|text_model|backbone)\.)+")
_FRONTS = ("", "model.", "language_model.model.", "model.language_model.")
_EXPERT_ENDS = ("", ".0.gate_proj", ".0.up_proj", ".0.down_proj", ".0.w1")

Rules = tuple[tuple[str, float | None], ...]
"""Patterns of module paths with the bits of their weights, None for not quantised. A pattern is a
path, a part of one, a glob, or a regular expression after "re:". The first that fits counts."""


class StoredBits:
    """How the matrices of a model are stored."""

    def __init__(
        self,
        usual: float | None,
        rules: Rules = (),
        *,
        only_experts: bool = False,
        head_too: bool = False,
    ) -> None:
        """`usual`: bits of a weight of a matrix that no rule names; None if it isn't quantised.

        `head_too`: whether the output embedding is quantised like any matrix. Raises re.error and
        ValueError.
        """
        for bits in (usual, *(bits for _, bits in rules)):
            if bits is not None and not 0 < bits <= 32:
                raise ValueError(bits)
        self._usual = usual
        self._only_experts = only_experts
        self._head_too = head_too
        self._patterns: list[tuple[int, re.Pattern[str], float | None]] = []
        # Mixed precisions name every matrix of every expert: looked up, not gone through.
        self._paths: dict[str, tuple[int, float | None]] = {}
        for place, (pattern, bits) in enumerate(rules):
            if pattern.startswith("re:"):
                self._patterns.append((place, re.compile(pattern[3:]), bits))
            elif set(pattern) & set("*?["):
                # A glob means the modules below as well.
                glob = fnmatch.translate(pattern), fnmatch.translate(f"{pattern}.*")
                self._patterns.append((place, re.compile("|".join(glob)), bits))
            else:
                self._paths.setdefault(_FRONT.sub("", pattern).strip("."), (place, bits))

    def bits(self, path: str, *, is_expert: bool, is_head: bool) -> float:
        """Bits of a weight of the module at `path`, its part of the scales included."""
        fitting = list(self._fitting(path, is_expert))
        if fitting:
            bits = min(fitting, key=lambda rule: rule[0])[1]
        elif (is_head and not self._head_too) or (self._only_experts and not is_expert):
            bits = None
        else:
            bits = self._usual
        return _PLAIN if bits is None else bits

    def _fitting(self, path: str, is_expert: bool) -> Iterator[tuple[int, float | None]]:
        """Place and bits of the rules that mean the module at `path` or one around it."""
        stem = _FRONT.sub("", path)
        # A checkpoint has a module for each expert's matrices, the library one for all.
        for one in (f"{stem}{end}" for end in (_EXPERT_ENDS if is_expert else ("",))):
            parts = one.split(".")
            for first in range(len(parts)):
                for end in range(first + 1, len(parts) + 1):
                    if rule := self._paths.get(".".join(parts[first:end])):
                        yield rule
            for place, pattern, bits in self._patterns:
                if any(pattern.match(f"{front}{one}") for front in _FRONTS):
                    yield place, bits


class _RefusedError(Exception):
    """What isn't understood, as a clause."""


def read_quantization(config: Mapping[str, Any], name: str) -> StoredBits | None:
    """What `quantization_config` says; None if the weights are not quantised.

    Raises ConfigError, naming --weight-bytes, for what isn't understood.
    """
    block = config.get("quantization_config") or config.get("compression_config")
    if not block:
        return None
    try:
        if not isinstance(block, Mapping):
            raise _RefusedError("is no object")
        method = str(block.get("quant_method") or _method_of(block)).lower().replace("_", "-")
        reader = _METHODS.get(method)
        if reader is None:
            raise _RefusedError(f"has the method {method!r}")
        return reader(block)
    except (_RefusedError, re.error, LookupError, TypeError, ValueError, ArithmeticError,
            AttributeError) as error:  # fmt: skip
        why = str(error) if isinstance(error, _RefusedError) else "has fields of unknown form"
        raise ConfigError(
            f"The quantization_config of {name!r} {why}, by which its weights can't be sized; give "
            "the bytes per parameter as --weight-bytes, about 0.56 for 4 bits and 1.03 for 8."
        ) from None


def _method_of(block: Mapping[str, Any]) -> str:
    if "quantization" in block or "quant_algo" in block:
        return "modelopt"
    return "compressed-tensors" if "config_groups" in block else "none"


# -- methods --------------------------------------------------------------------------------------


def _fp8(block: Mapping[str, Any]) -> StoredBits:
    shape = block.get("weight_block_size") or block.get("block_structure")
    return StoredBits(8 + (32 / (shape[0] * shape[1]) if shape else 0), _left_out(block))


def _int8(block: Mapping[str, Any]) -> StoredBits:
    return StoredBits(8, _left_out(block))


def _mxfp4(block: Mapping[str, Any]) -> StoredBits:
    return StoredBits(_MXFP4, _left_out(block), only_experts=True)


def _grouped(block: Mapping[str, Any]) -> StoredBits:
    """AWQ, GPTQ and AutoRound: integers in groups, each with a scale and a zero point."""
    bits = block.get("bits", block.get("w_bit"))
    size = block.get("group_size", block.get("q_group_size"))
    if not bits:
        raise _RefusedError("has no bits")
    rules = list(_left_out(block))

    def changed(change: Mapping[str, Any]) -> float | None:
        own = change.get("bits", bits)
        return None if own >= 16 else _group_bits(own, change.get("group_size", size))

    for pattern, change in (block.get("dynamic") or {}).items():
        bare = f"re:{pattern.removeprefix('-:').removeprefix('+:')}"
        rules.append((bare, None if pattern.startswith("-:") else changed(change)))
    for pattern, change in (block.get("extra_config") or {}).items():
        other = changed(change)
        rules.append((f"re:.*{pattern}" if set(pattern) & set("*+[(") else pattern, other))
    return StoredBits(_group_bits(bits, size), tuple(rules), head_too=bool(block.get("lm_head")))


def _bitsandbytes(block: Mapping[str, Any]) -> StoredBits:
    if block.get("load_in_4bit"):
        # Blocks of 64 with a float32 scale, which may be quantised in turn.
        scale = 8 + 32 / 256 if block.get("bnb_4bit_use_double_quant") else 32
        return StoredBits(4 + scale / 64, _left_out(block))
    if block.get("load_in_8bit"):
        return StoredBits(8, _left_out(block))
    raise _RefusedError("says neither load_in_4bit nor load_in_8bit")


def _compressed_tensors(block: Mapping[str, Any]) -> StoredBits:
    sparsity = block.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense" or "24" in str(block.get("format", "")):
        raise _RefusedError("has sparse weights")
    usual: float | None = None
    rules = list(_left_out(block))
    groups = block.get("config_groups") or {}
    if not groups:
        raise _RefusedError("has no config_groups")
    for group in groups.values():
        bits = _tensor_bits(group.get("weights"))
        for target in group.get("targets") or ():
            if target == "Linear":
                usual = bits
            elif target[:1].isupper():
                raise _RefusedError(f"quantises modules of the class {target}")
            else:
                rules.append((target, bits))
    return StoredBits(usual, tuple(rules), head_too=True)


def _tensor_bits(weights: Mapping[str, Any] | None) -> float | None:
    if not weights:
        return None
    bits, size = weights["num_bits"], weights.get("group_size")
    if weights.get("strategy") == "block":
        rows, columns = weights["block_structure"]
        return float(bits + 32 / (rows * columns))
    if not size or size < 0:
        return float(bits)
    scale = 8 if weights.get("type") == "float" and bits == 4 else 16
    zero = bits if weights.get("symmetric") is False else 0
    return float(bits + (scale + zero) / size)


def _modelopt(block: Mapping[str, Any]) -> StoredBits:
    inner = block.get("quantization") or block
    if inner.get("quant_algo") is None:
        # Only the KV cache is quantised.
        return StoredBits(None)
    algorithm = str(inner["quant_algo"]).upper()
    rules = list(_left_out(inner))
    if algorithm == "MIXED_PRECISION":
        layers = inner.get("quantized_layers")
        if not layers:
            raise _RefusedError("mixes precisions without quantized_layers")
        rules += [(path, _algorithm_bits(layer, inner)) for path, layer in layers.items()]
        return StoredBits(None, tuple(rules), head_too=True)
    return StoredBits(_algorithm_bits(inner, inner), tuple(rules), head_too=True)


_EIGHT_BITS = frozenset(
    {
        "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "INT8_SQ",
        "W8A8_SQ_PER_CHANNEL",
    }
)  # fmt: skip


def _algorithm_bits(layer: Mapping[str, Any], block: Mapping[str, Any]) -> float:
    algorithm = str(layer.get("quant_algo")).upper()
    size = layer.get("group_size") or block.get("group_size")
    if algorithm in _EIGHT_BITS:
        return 8.0
    if algorithm in ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"):
        return 4 + 8 / (size or 16)
    if algorithm == "MXFP4":
        return _MXFP4
    if algorithm == "MXFP8":
        return 8 + 8 / 32
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ", "INT4_AWQ"):
        return 4 + 16 / (size or 128)
    raise _RefusedError(f"has the algorithm {algorithm}")


_QUARK = {"fp8_e4m3": 8.0, "fp8_e5m2": 8.0, "int8": 8.0, "uint8": 8.0, "int4": 4.0, "uint4": 4.0,
          "fp4": 4.0}  # fmt: skip


def _quark(block: Mapping[str, Any]) -> StoredBits:
    usual = _quark_bits(block.get("global_quant_config") or {})
    rules = list(_left_out(block))
    for pattern, change in (block.get("layer_quant_config") or {}).items():
        rules.append((pattern, _quark_bits(change)))
    if block.get("layer_type_quant_config"):
        raise _RefusedError("has a layer_type_quant_config")
    return StoredBits(usual, tuple(rules), head_too=True)


def _quark_bits(config: Mapping[str, Any]) -> float | None:
    weight: Any = config.get("weight")
    if isinstance(weight, list):
        raise _RefusedError("quantises weights in stages")
    if not weight:
        return None
    kind = str(weight.get("dtype"))
    if kind not in _QUARK:
        raise _RefusedError(f"has weights of the type {kind}")
    size = weight.get("group_size")
    if weight.get("qscheme") != "per_group" or not size:
        return _QUARK[kind]
    return _QUARK[kind] + (8.0 if kind == "fp4" else 16.0) / float(size)


def _group_bits(bits: float, size: int | None) -> float:
    if not size or size < 0:
        return float(bits)
    return bits + (16 + bits) / size


_METHODS: dict[str, Callable[[Mapping[str, Any]], StoredBits]] = {
    "fp8": _fp8,
    "fbgemm-fp8": _fp8,
    "finegrained-fp8": _fp8,
    "w8a8-fp8": _fp8,
    "w8a8-int8": _int8,
    "mxfp4": _mxfp4,
    "awq": _grouped,
    "gptq": _grouped,
    "auto-round": _grouped,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
    "modelopt-fp8": _modelopt,
    "quark": _quark,
}


def _left_out(block: Mapping[str, Any]) -> Rules:
    """Rules for the modules that a config names as not quantised."""
    names: Iterable[str] = ()
    for key in (
        "ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude",
        "llm_int8_skip_modules",
    ):  # fmt: skip
        names = (*names, *(block.get(key) or ()))
    return tuple((str(name), None) for name in names)
