"""What transformers knows of a model: the fields a config.json leaves out, and the weights it has.

Released configs leave fields to their library's defaults, and say by fields of their own which
layers are what. The library's config class resolves both, and its model class, built without memory
for its weights, has every parameter. Both are optional: without transformers or torch, or for a
model they don't know, the config is taken as it stands.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from tiered_kv.core.config_reader import innermost, language_model
from tiered_kv.plan.weights import Kind, Part

# What attribute maps and properties of config classes give, whatever the fields are called.
_COMMON = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "layer_types",
)  # fmt: skip


def library_config(config: Mapping[str, Any]) -> Any | None:
    """The config object of the library for a parsed config.json; None if it has none.

    Of a model around a language model whose own type the library doesn't know, it is the language
    model's.
    """
    with _quiet():
        for block in (config, language_model(config)):
            try:
                kind = _config_class(block)
                made = None if kind is None else kind.from_dict(dict(block))
            except Exception:
                # What a class doesn't take, our reader names.
                continue
            if made is not None:
                # Of a model that hears and speaks, servers run the part that thinks.
                made = getattr(made, "thinker_config", made)
                made.tie_word_embeddings = _is_tied(config, made)
                return made
    return None


def _is_tied(config: Mapping[str, Any], made: Any) -> bool:
    """Whether the output embedding is the input's. The file's word counts, the outermost first.

    Without one, the defaults of the blocks' classes; where they differ, released models are not.
    """
    for block in (config, innermost(config)):
        if block.get("tie_word_embeddings") is not None:
            return bool(block["tie_word_embeddings"])
    blocks = (made, made.get_text_config(decoder=True))
    return all(getattr(block, "tie_word_embeddings", True) for block in blocks)


def generates(made: Any) -> bool:
    """Whether the library has a model of this config that writes text."""
    text = type(made.get_text_config(decoder=True))
    mappings = _mappings()
    return any(kind in mapping for kind in (type(made), text) for mapping in mappings)


def completed(config: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """The language model's fields in `config`, with those that the library's `made` adds."""
    text = made.get_text_config(decoder=True)
    added = dict(text.to_dict())
    for key in _COMMON:
        # Where layers differ in it, later releases give no value for all: the written one counts.
        with contextlib.suppress(Exception):
            added[key] = getattr(text, key)
    fields = dict(language_model(config))
    fields.update({key: value for key, value in added.items() if value is not None})
    # What is written counts, also where the class makes something else of it.
    written = innermost(config)
    fields.update({key: value for key, value in written.items() if value is not None})
    # These stand on the outside, and the class of a nested block has its own idea of them.
    for key in ("architectures", "is_encoder_decoder"):
        fields[key] = config.get(key, getattr(made, key, None))
    fields["tie_word_embeddings"] = made.tie_word_embeddings
    return fields


def library_parts(made: Any) -> list[Part] | None:
    """Every weight of the model that the config object `made` describes, none of it in memory.

    None if the library can't build it.
    """
    with _quiet():
        try:
            import torch

            with _without_kernels(), torch.device("meta"):
                model = _model_class(made)(made)
            return list(_parts(model))
        except Exception:
            # Then it is counted from its shapes, or refused.
            return None


def _config_class(block: Mapping[str, Any]) -> Any:
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return None
    # By name, not by CONFIG_MAPPING: whoever else is in this process registers classes of its own
    # there (SGLang does), which may lack the defaults and the models.
    own = CONFIG_MAPPING_NAMES.get(str(block.get("model_type")))
    if own is not None:
        return getattr(transformers, own)
    # A model may have another's architecture under a type of its own.
    for name in block.get("architectures") or ():
        model = getattr(transformers, str(name), None)
        if kind := getattr(model, "config_class", None):
            return kind
    return None


def _model_class(made: Any) -> Any:
    import transformers

    for name in made.architectures or ():
        model = getattr(transformers, name, None)
        if getattr(model, "config_class", None) is type(made):
            return model
    for mapping in _mappings():
        if type(made) in mapping:
            return mapping[type(made)]
    raise LookupError(type(made).__name__)


def _mappings() -> tuple[Any, ...]:
    """From config classes to those of models that write text."""
    from transformers.models.auto import modeling_auto as auto

    return (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )


def _parts(model: Any) -> Iterator[Part]:
    from torch import nn

    encoders = _encoders(model)
    head = model.get_output_embeddings()
    head_weights = {id(weight) for weight in head.parameters()} if head is not None else set()
    text = model.config.get_text_config(decoder=True)
    n_empty = getattr(text, "zero_expert_num", 0)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                # The head is the embedding, where they are tied.
                continue
            seen.add(id(weight))
            if id(weight) in encoders:
                kind = Kind.ENCODER
            elif isinstance(module, nn.Embedding):
                kind = Kind.EMBEDDING
            elif id(weight) in head_weights:
                kind = Kind.HEAD
            elif _is_expert(module, path, name, weight):
                kind = Kind.EXPERT
            elif isinstance(module, nn.Linear) and name == "weight":
                kind = Kind.LINEAR
            else:
                kind = Kind.OTHER
            n = weight.numel()
            if n_empty and weight.shape[0] == text.n_routed_experts + n_empty:
                # Experts that pass on what they get have places in the library's, but no weights.
                n -= n // weight.shape[0] * n_empty
            yield Part(path, n, kind)


def _encoders(model: Any) -> set[int]:
    """Ids of the weights of those models within `model` that are no language models."""
    from transformers import PreTrainedModel

    text = model.config.get_text_config(decoder=True)
    return {
        id(weight)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and not any(module.config is known for known in (text, model.config))
        for weight in module.parameters()
    }


def _is_expert(module: Any, path: str, name: str, weight: Any) -> bool:
    """Whether a decoder's weight belongs to experts: to one, or one matrix each in a stack."""
    is_stack = weight.ndim == 3 and "Conv" not in type(module).__name__
    return (is_stack or (".experts" in path and weight.ndim > 1)) and "bias" not in name


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """Models of state-space layers would fetch kernels from the network for being built."""
    from transformers.integrations import hub_kernels

    known = hub_kernels._HUB_KERNEL_MAPPING
    kept = dict(known)
    known.clear()
    try:
        yield
    finally:
        known.update(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library speaks of token ids and of what is deprecated: nobody's question here."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
