"""Which layers of a decoder keep KV for every token, in the many dialects of config.json.

A model says it by naming every layer, by a pattern, by lists of layers, by a period, by a block per
layer, or not at all. What isn't understood is refused by its name: a model whose layers are counted
wrongly gets a plan that is wrong by a factor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tiered_kv.core.config_reader import ConfigReader, shown

FULL = "full_attention"
WINDOW = "sliding_attention"

Kinds = tuple[str, ...]
"""One per layer: FULL, WINDOW, or the config's own word for a layer that keeps no KV per token."""

# fmt: off
_FULL = frozenset(
    {
        FULL, "attention", "full", "attn", "global", "global_attention", "softmax",
        "deepseek_sparse_attention",
        "indexed_attention",  # what transformers calls the same from 5.19 on
        # Attention beside or before a state-space block, which needs its KV all the same.
        "hybrid",
    }
)
_WINDOW = frozenset(
    {
        WINDOW, "chunked_attention", "local", "local_attention", "swa", "sliding", "sliding_window",
    }
)
_NO_KV = frozenset(
    {
        "linear_attention", "linear", "mamba", "mamba1", "mamba2", "ssm", "recurrent", "conv",
        "short_conv", "gated_deltanet", "gdn", "kda", "lightning", "lightning_attention", "jet",
        "rwkv", "mlp", "moe", "cross_attention", "none", "no_op",
    }
)
# fmt: on
_LETTERS = {"M": "mamba", "*": FULL, "-": "mlp", "E": "moe"}
_NAMED = ("layer_types", "layers_block_type", "layer_block_types", "attention_layers")
_LISTED = {
    "attn_layer_indices": (FULL, "mamba"),
    "full_attn_idxs": (FULL, "conv"),
    "hybrid_layer_ids": (FULL, "mamba"),
    "cross_attention_layers": ("cross_attention", FULL),
    "local_layer_ids": (WINDOW, FULL),
}
"""Lists of layers, with what these are and what the others are."""
_REPEATED = ("block_types", "_block_types")
_BLOCKS = "block_configs"
_KDA = "linear_attn_config"


def read_kinds(reader: ConfigReader, n_layers: int) -> Kinds:
    """What each of `n_layers` layers is, by what the config says.

    Raises ConfigError, naming the field, for a kind or a field that isn't known, for fields that
    contradict each other, and if no layer keeps KV.
    """
    _refuse_unread(reader, n_layers)
    found: dict[str, Kinds] = {}
    for dialect in (*_EXPLICIT, *_REGULAR):
        if dialect in _REGULAR and found:
            # A rule says less than a list does: some libraries write both, and mean the list.
            break
        if (said := dialect(reader, n_layers)) is not None:
            found[said[0]] = said[1]
    if not found:
        refuse_states(reader)
        return (FULL,) * n_layers
    (first, kinds), *others = found.items()
    for key, other in others:
        if [keeps_kv(kind) for kind in kinds] != [keeps_kv(kind) for kind in other]:
            raise reader.error(f"says by {first} and by {key} that different layers keep KV")
    if not any(map(keeps_kv, kinds)):
        raise reader.error(f"has only {kinds[0]} layers, which keep no KV that could be cached")
    return kinds


def keeps_kv(kind: str) -> bool:
    """Whether a layer of this kind keeps KV for every token, at least within its window."""
    return kind in (FULL, WINDOW)


def window_tokens(reader: ConfigReader) -> int:
    """Tokens that a WINDOW layer looks back; 0 if the config doesn't say."""
    for key in ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size",
                "sliding_window_size"):  # fmt: skip
        value = reader.config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


# -- dialects: each gives the field it read and the kinds, or None without such a field ----------

_Said = tuple[str, Kinds] | None


def _by_name(reader: ConfigReader, n_layers: int) -> _Said:
    for key in (*_NAMED, *_REPEATED):
        words = reader.listed(key)
        if words is None:
            continue
        if key in _REPEATED:
            words = [words[index % len(words)] for index in range(n_layers)]
        reader.require_length(key, words, n_layers)
        kinds = tuple(_kind(reader, word) for word in words[:n_layers])
        if "recurrent" in kinds:
            # Griffin's attention is local, whatever its word.
            kinds = tuple(WINDOW if kind == FULL else kind for kind in kinds)
        return key, kinds
    return None


def _by_letters(reader: ConfigReader, n_layers: int) -> _Said:
    key = "hybrid_override_pattern"
    pattern = reader.config.get(key)
    if not isinstance(pattern, str) or not pattern:
        return None
    strange = sorted(set(pattern) - set(_LETTERS))
    if strange:
        raise reader.error(f"has {strange[0]!r} in {key}, which isn't known to keep KV or not")
    reader.require_length(key, pattern, n_layers)
    return key, tuple(_LETTERS[letter] for letter in pattern[:n_layers])


def _by_flags(reader: ConfigReader, n_layers: int) -> _Said:
    for key, words in (
        ("attn_type_list", ("linear_attention", FULL)),
        ("hybrid_layer_pattern", (FULL, WINDOW)),
    ):
        if flags := reader.listed(key):
            reader.require_length(key, flags, n_layers)
            if any(flag not in (0, 1) for flag in flags):
                raise reader.error(f"has {key} = {shown(flags)}, which must hold 0 and 1 only")
            return key, tuple(words[int(flag)] for flag in flags[:n_layers])
    return None


def _by_index(reader: ConfigReader, n_layers: int) -> _Said:
    """Lists of the layers that are different, counted from 0."""
    for key, (listed, rest) in _LISTED.items():
        if indices := reader.listed(key):
            chosen = _indices(reader, key, indices, range(n_layers))
            return key, tuple(listed if index in chosen else rest for index in range(n_layers))
    return None


def _by_two_lists(reader: ConfigReader, n_layers: int) -> _Said:
    """Kimi's linear attention: both kinds of layers, counted from 1."""
    block = reader.config.get(_KDA)
    if not isinstance(block, Mapping):
        return None
    numbers = range(1, n_layers + 1)
    lists = ConfigReader(block, reader.name)
    both = [
        _indices(reader, f"{_KDA}.{key}", lists.listed(key) or (), numbers)
        for key in ("full_attn_layers", "kda_layers")
    ]
    if sorted(both[0] | both[1]) != list(numbers) or both[0] & both[1]:
        raise reader.error(f"does not say in {_KDA} of each of its {n_layers} layers what it is")
    return _KDA, tuple(FULL if number in both[0] else "kda" for number in numbers)


def _by_block(reader: ConfigReader, n_layers: int) -> _Said:
    """Architectures found by search (DeciLM, Nemotron-NAS): a block for each layer."""
    blocks = reader.listed(_BLOCKS)
    if blocks is None:
        return None
    reader.require_length(_BLOCKS, blocks, n_layers)
    return _BLOCKS, tuple(_block_kind(reader, block) for block in blocks[:n_layers])


def _by_period(reader: ConfigReader, n_layers: int) -> _Said:
    config = reader.config
    for key, others in (
        ("full_attention_interval", "linear_attention"),
        ("layer_group_size", "linear_attention"),
        ("global_attn_every_n_layers", WINDOW),
        ("sliding_window_pattern", WINDOW),
        ("_sliding_window_pattern", WINDOW),
    ):
        every = config.get(key)
        if isinstance(every, str) and set(every) <= {"L", "G"} and every:
            letters = (every * n_layers)[:n_layers]
            return key, tuple(WINDOW if letter == "L" else FULL for letter in letters)
        if every is None or (others == WINDOW and not window_tokens(reader)):
            continue
        every = reader.need(key)
        return key, tuple(FULL if (index + 1) % every == 0 else others for index in range(n_layers))
    if config.get("attn_layer_period") is not None:
        period, offset = reader.need("attn_layer_period"), reader.take("attn_layer_offset")
        return "attn_layer_period", tuple(
            FULL if index % period == offset else "mamba" for index in range(n_layers)
        )
    return None


_Dialect = Callable[[ConfigReader, int], _Said]
_EXPLICIT: tuple[_Dialect, ...] = (
    _by_name, _by_letters, _by_flags, _by_index, _by_two_lists, _by_block,
)  # fmt: skip
_REGULAR: tuple[_Dialect, ...] = (_by_period,)


def _kind(reader: ConfigReader, word: object) -> str:
    text = str(word).lower()
    if text in _FULL:
        return FULL
    if text in _WINDOW:
        return WINDOW
    if text in _NO_KV:
        return text
    raise reader.error(
        f"has {word} layers, of which it isn't known what they keep per token; only attention, "
        "linear attention, state-space and convolution layers can be planned"
    )


def _block_kind(reader: ConfigReader, block: object) -> str:
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(attention, Mapping):
        raise reader.error(f"has an entry without attention in {_BLOCKS}; correct it")
    if attention.get("no_op"):
        return "no_op"
    if attention.get("replace_with_linear"):
        return "linear"
    for key in ("mamba", "linear_attention"):
        if attention.get(key):
            return key
    return WINDOW if attention.get("window_length") else FULL


def _indices(
    reader: ConfigReader, key: str, indices: Sequence[Any], allowed: range
) -> frozenset[int]:
    strange = [index for index in indices if index not in allowed]
    if strange:
        raise reader.error(
            f"has {shown(strange[0])} in {key}, but layers from {allowed[0]} to {allowed[-1]} only"
        )
    return frozenset(indices)


# -- fields that would change the count if they were understood ----------------------------------

_CHANGES_KV = re.compile(
    r"(kv|key_value)_?heads|heads_kv|swa_|_swa|(kv|key_value)\w*_?(shar|reus)|(shar|reus)\w*_(kv|key_value)|cross_layer|^yoco|compress_ra"
    r"|^loop_|_loops?$|ut_steps|^n_loop|num_loop|recurrent_depth|nope_kv|kv_compress"
)
_COUNTED = frozenset(
    {
        "num_kv_shared_layers", "loop_num", "loop_window_size", "num_key_value_heads",
        "num_kv_heads", "num_key_value_heads_per_layer", "num_global_key_value_heads",
        "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim", "swa_num_attention_heads",
        "swa_rope_theta", "add_swa_attention_sink_bias", "n_head_kv", "disable_hybrid_swa_memory",
    }
)  # fmt: skip
_LISTS_LAYERS = re.compile(r"_(layers|layer_ids|layer_indices|layer_idxs|attn_idxs)$|^attn_layers$")
_LISTS_OTHERS = re.compile(
    r"^(no_rope|moe|mlp_only|mtp|dense|rope|eagle|num|quant|max_window)"
    r"|vision|visual|image|audio|spatial|feature|deepstack"
)
_SAYS_STATE = re.compile(
    r"mamba|(^|_)ssm|rwkv|recurren|retention|linear_att|lightning|delta_?net|(^|_)kda|(^|_)gla_"
    r"|hybrid|conv_kernel|short_?conv|conv_l_cache|(^|_)state_(size|dtype|dim)|lstm|(layer|block|attn|attention)s?_(type|pattern|"
    r"period|interval|schedule)s?(_list)?$"
)
_STATE_TYPES = re.compile(
    r"rwkv|mamba|retnet|(^|_)gla(_|$)|delta_?net|hgrn|linear_attn|(^|_)gsa(_|$)|hyena|lstm|(^|_)ssm"
)
_OF_OTHER_THINGS = re.compile(r"^(moe|expert|mlp|ffn|no_rope|rope)_")
_PER_LAYER = frozenset(
    {
        # What each layer has besides its KV, or what `kv_layers` reads.
        "no_rope_layers", "moe_layer_freq", "mlp_layer_types", "moe_layers", "indexer_types",
        "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "num_key_value_heads",
        "num_kv_heads", "num_query_heads", "ffn_multipliers", "intermediate_size", "moe_topk",
        "activation_sparsity_pattern", "num_shared_expert", "moe_intermediate_size",
        "sliding_window", "rope_theta", "partial_rotary_factors", "swiglu_limits",
        "swiglu_limits_shared", "use_rope_layers", "attn_type_list", "hybrid_layer_pattern",
    }
)  # fmt: skip


def _refuse_unread(reader: ConfigReader, n_layers: int) -> None:
    read = {*_NAMED, *_REPEATED, *_LISTED, _BLOCKS, *_PER_LAYER}
    for key, value in reader.config.items():
        if not value or key in _COUNTED:
            continue
        varies = (
            isinstance(value, list | tuple)
            and len(value) == n_layers > 1
            and len(set(map(repr, value))) > 1
            and sorted(map(repr, value)) != sorted(map(repr, range(n_layers)))
        )
        lists = (
            isinstance(value, list | tuple)
            and _LISTS_LAYERS.search(key)
            and not _LISTS_OTHERS.search(key)
        )
        if _CHANGES_KV.search(key.lower()) or ((varies or lists) and key not in read):
            raise reader.error(
                f"has {key} = {shown(value)}, which may change what layers keep and isn't "
                "understood"
            )


def refuse_states(reader: ConfigReader) -> None:
    """Raise ConfigError if the config speaks of layers without KV, but not which they are."""
    kind = str(reader.config.get("model_type"))
    if _STATE_TYPES.search(kind) or isinstance(reader.config.get("attn"), Mapping):
        raise reader.error(
            f"is of the type {kind}, whose layers keep a state instead of KV, or not all KV; add "
            "layer_types, one word for each layer, if some do"
        )
    for key, value in reader.config.items():
        if value and not _OF_OTHER_THINGS.match(key) and _SAYS_STATE.search(key.lower()):
            raise reader.error(
                f"has {key} = {shown(value)}, but does not say which layers keep KV in a way "
                "that is understood; add layer_types, one word for each layer"
            )
