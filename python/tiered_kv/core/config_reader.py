"""Takes sizes out of a parsed `config.json`, whatever they are called there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiered_kv.core.errors import ConfigError

_NESTED = ("thinker_config", "text_config", "language_config", "llm_config")
_MOST = 10**9
_MOST_LAYERS = 10_000
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model that `config` describes, however deep it is nested.

    What a nested block leaves out, such as tied embeddings or how weights are stored, stands on the
    outside.
    """
    fields = dict(config)
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, Mapping) and nested:
            del fields[key]
            return {**fields, **language_model(nested)}
    return fields


def innermost(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Only what the block of the language model itself says."""
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, Mapping) and nested:
            return innermost(nested)
    return config


class ConfigReader:
    """One language model's config, and the name that errors give it."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def error(self, what: str) -> ConfigError:
        """`what` goes on after "The config of NAME", without a full stop."""
        return ConfigError(f"The config of {self.name!r} {what}.")

    def take(self, *keys: str) -> int:
        """The first of `keys` that the config has; 0 if it has none. Raises ConfigError.

        A list of equal numbers, one for each layer, counts as that number.
        """
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, list | tuple) and len(set(map(repr, value))) == 1:
                value = value[0]
            return self._whole(key, value)
        return 0

    def need(self, *keys: str) -> int:
        """Like `take`, but the size must be there and positive."""
        value = self.take(*keys)
        if not value:
            raise self.error(f"has no {keys[0]}; add it, as a decoder's config.json has it")
        return value

    def each(self, n_layers: int, *keys: str) -> list[int]:
        """One number for each of `n_layers` layers, from a list of them or a number for all."""
        for key in keys:
            if (values := self.listed(key)) is not None:
                self.require_length(key, values, n_layers)
                return [self._whole(key, value) for value in values[:n_layers]]
        return [self.take(*keys)] * n_layers

    def listed(self, key: str) -> list[Any] | None:
        """The list under `key`; None if there is no list, or an empty one."""
        values = self.config.get(key)
        return list(values) if isinstance(values, list | tuple) and values else None

    def require_length(self, key: str, values: Sequence[object], n_layers: int) -> None:
        """Raise ConfigError unless `values` has an entry for every layer; more are for MTP."""
        if len(values) < n_layers:
            raise self.error(
                f"has {n_layers} layers but {len(values)} entries in {key}; correct one of them"
            )

    def n_layers(self) -> int:
        """How many layers the decoder has."""
        for key in ("hybrid_override_pattern", "layers_block_type"):
            # They say it themselves; a number beside them is deprecated.
            if isinstance(layers := self.config.get(key), str | list | tuple) and layers:
                return len(layers)
        found = self.need(*_LAYER_COUNTS)
        if "longcat_flash" in str(self.config.get("model_type")) and self.config.get("num_layers"):
            # Each of its layers has attention twice.
            found = 2 * self.need("num_layers")
        if found > _MOST_LAYERS:
            raise self.error(f"has {found:,} layers, more than any model; correct it")
        return found

    def _whole(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
            raise self.error(
                f"has {key} = {shown(value)}, which is not a whole number from 0 to {_MOST:,}; "
                "correct it"
            )
        return value


def shown(value: object) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
