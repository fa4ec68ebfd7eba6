"""The model to plan for: a preset, or whatever a config.json describes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tiered_kv.core.config_reader import language_model
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_config import Shape, read_shape
from tiered_kv.core.model_spec import ModelSpec, find_model
from tiered_kv.core.paths import expand_user
from tiered_kv.plan.library import completed, generates, library_config, library_parts
from tiered_kv.plan.weights import Kind, Part, count, parts_of_shape, weight_bytes

_BY_SHAPE = (
    "Parameters are counted from the config's sizes as of a usual decoder, for transformers can't "
    "build the model."
)
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([BMT]?)", re.IGNORECASE)
_FACTORS = {"": 1, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the caller knows better than the config."""

    parameters: str | None = None
    """All parameters and, after a colon, those that a token uses: "48B:3B"."""
    weight_bytes: float | None = None
    """Bytes per parameter; None for what the config says."""
    kv_bytes: float = 2.0
    """Bytes per element of KV."""


class Loaded(NamedTuple):
    """A model, and how far to trust its figures."""

    model: ModelSpec
    note: str = ""
    """A sentence for the user; empty if there is nothing to say."""


def load_model(name: str, overrides: Overrides) -> Loaded:
    """The preset called `name`, or the model of the config.json at that path or in that directory.

    Raises ConfigError, in one sentence.
    """
    path = expand_user("--model", name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        model, given_bytes = find_model(name), overrides.weight_bytes
        total, active = _given(overrides) or (model.n_parameters, model.n_active_parameters)
        return Loaded(
            replace(
                model,
                n_parameters=total,
                n_active_parameters=active,
                weight_bytes_per_parameter=2.0 if given_bytes is None else given_bytes,
                kv_bytes_per_element=overrides.kv_bytes,
            )
        )
    label = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    config = _read_json(path)
    beside = path.parent / "hf_quant_config.json"
    if "quantization_config" not in config and path.name == "config.json" and beside.exists():
        config["quantization_config"] = _read_json(beside)
    return model_of_config(config, label, overrides)


def with_draft(loaded: Loaded, draft: ModelSpec) -> Loaded:
    """`loaded` beside a model, or heads, that draft for it (docs/models.md): its weights lie on the
    device, too, and its KV with that of the model in every tier. A pass is one of both."""
    model = loaded.model
    both = replace(
        model,
        name=f"{model.name} with {draft.name}",
        n_layers=model.n_layers + draft.n_layers,
        n_parameters=model.n_parameters + draft.n_parameters,
        n_active_parameters=model.n_active_parameters + draft.n_active_parameters,
        kv_layers=model.attending + draft.attending,
    )
    kib = draft.kv_bytes_per_token / 1024
    return Loaded(both, f"{loaded.note} {kib:.1f} KiB of that are the draft's.".strip())


def model_of_config(config: Mapping[str, Any], label: str, overrides: Overrides) -> Loaded:
    """The model that `config`, a parsed config.json, describes. Raises ConfigError."""
    made = library_config(config)
    if made is not None and not generates(made):
        raise ConfigError(
            f"The config of {label!r} is of the type {made.model_type}, of which transformers has "
            "no model that writes text; name a decoder's config.json."
        )
    fields = language_model(config) if made is None else completed(config, made)
    shape = read_shape(fields, label)
    parts = made and library_parts(made)
    is_exact = bool(parts) or overrides.parameters is not None
    parts = parts or _parts_of_shape(shape, overrides)
    total, active = _given(overrides) or count(parts, shape)
    n_bytes = overrides.weight_bytes
    if n_bytes is None:
        n_bytes = weight_bytes(parts, fields, label) / sum(part.n for part in parts)
    model = ModelSpec.of_shape(
        shape,
        n_parameters=total,
        n_active_parameters=active,
        weight_bytes_per_parameter=n_bytes,
        kv_bytes_per_element=overrides.kv_bytes,
    )
    return Loaded(model, "" if is_exact else _BY_SHAPE)


def _parts_of_shape(shape: Shape, overrides: Overrides) -> list[Part]:
    """The weights by the config's sizes, or by the number given if these don't tell."""
    try:
        return parts_of_shape(shape)
    except ConfigError:
        given = _given(overrides)
        if given is None:
            raise
        return [Part("model.layers", given[0], Kind.UNKNOWN)]


def _given(overrides: Overrides) -> tuple[int, int] | None:
    """All parameters, and those that a token uses, as the caller said."""
    if overrides.parameters is None:
        return None
    counts = [_count(text) for text in overrides.parameters.split(":")]
    if len(counts) > 2 or counts[-1] > counts[0]:
        raise ConfigError(
            f"{overrides.parameters!r} is no number of parameters; write 48B, or 48B:3B with those "
            "that a token uses."
        )
    return counts[0], counts[-1]


def _count(text: str) -> int:
    found = _COUNT.fullmatch(text.strip())
    number = round(float(found[1]) * _FACTORS[found[2].upper()]) if found else 0
    if number < 1:
        raise ConfigError(f"{text!r} is no number of parameters; write 48B or 135M.")
    return number


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); name a config.json.") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON; name a Hugging Face config.json.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object; name a Hugging Face config.json.")
    return config
