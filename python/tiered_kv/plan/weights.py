"""What a model's weights take, as they are stored: in two bytes each, or quantised.

`quantization_config` says how matrices are stored, and which are left as they were. Methods and
fields that aren't known are refused: eight times too many bytes is no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_config import Shape
from tiered_kv.plan.quantization import StoredBits, read_quantization

PLAIN_BITS = 16.0
"""Of a weight that isn't quantised: servers load them in bf16 or fp16."""


class Kind(Enum):
    """What a weight is, as far as quantisation and a token's work differ by it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    LINEAR = "linear"
    EXPERT = "expert"
    ENCODER = "encoder"
    """Of images or sound: no token of text uses it."""
    OTHER = "other"
    UNKNOWN = "unknown"
    """All weights of a model together, of which no more is known than their number."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a model's weights."""

    path: str
    """Of the module, as checkpoints name it: model.layers.3.self_attn.q_proj."""
    n: int
    """Parameters."""
    kind: Kind


def parts_of_shape(shape: Shape) -> list[Part]:
    """The weights counted from a config's sizes. Raises ConfigError (see `Shape.count_parts`)."""
    # One path for all layers: lists of what is not quantised that name single layers, usually the
    # first and the last, are met by the one in the middle.
    layer = f"model.layers.{shape.n_layers // 2}"
    places = {
        "embedding": ("model.embed_tokens", Kind.EMBEDDING),
        "head": ("lm_head", Kind.HEAD),
        "attention": (f"{layer}.self_attn.o_proj", Kind.LINEAR),
        "mlp": (f"{layer}.mlp.down_proj", Kind.LINEAR),
        "shared_experts": (f"{layer}.mlp.shared_experts.down_proj", Kind.LINEAR),
        "experts": (f"{layer}.mlp.experts", Kind.EXPERT),
        "other": (f"{layer}.input_layernorm", Kind.OTHER),
    }
    return [Part(places[key][0], n, places[key][1]) for key, n in shape.count_parts().items() if n]


def count(parts: Iterable[Part], shape: Shape) -> tuple[int, int]:
    """All parameters of `parts`, and those that one token of text uses."""
    n = dict.fromkeys(Kind, 0)
    for part in parts:
        n[part.kind] += part.n
    total = sum(n.values())
    unused = 0.0
    if shape.experts:
        unused = n[Kind.EXPERT] * (1.0 - shape.experts.n_active / shape.experts.n_experts)
    return total, total - n[Kind.ENCODER] - round(unused)


def weight_bytes(parts: Sequence[Part], config: Mapping[str, Any], name: str) -> float:
    """Bytes of `parts` as the config says that they are stored.

    Raises ConfigError, naming --weight-bytes, for a way of storing that isn't understood.
    """
    stored = read_quantization(config, name)
    if stored is not None and any(part.kind is Kind.UNKNOWN for part in parts):
        raise ConfigError(
            f"The weights of {name!r} are quantised, but not all of them, and it isn't known how "
            "many; give the bytes per parameter as --weight-bytes."
        )
    return sum(part.n * _bits(part, stored) for part in parts) / 8.0


def _bits(part: Part, stored: StoredBits | None) -> float:
    if stored is None or part.kind in (Kind.EMBEDDING, Kind.OTHER, Kind.ENCODER):
        return PLAIN_BITS
    return stored.bits(
        part.path, is_expert=part.kind is Kind.EXPERT, is_head=part.kind is Kind.HEAD
    )
