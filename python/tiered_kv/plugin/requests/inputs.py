"""Names of images, videos and audio, by all that their KV comes of.

SGLang tells them apart by 64 bits of a hash over pixels, without their shape, or by what a client
calls their hash; these bits, or some of them, stand in for their tokens. So each is named here by
SHA-256 over everything that the model is given of it. SGLang keeps what the encoder made of it by
that name, too.

A request takes the names along as its `extra_key`, a `PromptKey`, wherever SGLang takes its tokens.
"""

from __future__ import annotations

import enum
import hashlib
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiered_kv.forest.inputs import TOKEN_LIMIT, Input, PromptKey, named
from tiered_kv.forest.key import SHARED_TREE, TOKEN_TYPECODE
from tiered_kv.plugin.upstream.current import request_kv

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs, Req

    from tiered_kv.tiers.context import TierContext

logger = logging.getLogger(__name__)

#: Under which an item's digest is kept. Looked up in its `__dict__`: other ways lead to what
#: clients have sent.
_DIGEST = "tiered_kv_digest"


def digest_of(item: MultimodalDataItem) -> bytes:
    """SHA-256 over all that the model is given of `item`. Raises TypeError for what has no bytes.

    Where it is in the prompt does not count, only how its parts lie to each other.
    """
    sha256 = hashlib.sha256(b"tiered-kv input 1\0")
    offsets = item.offsets or []
    layout = [(begin - offsets[0][0], end - offsets[0][0]) for begin, end in offsets]
    parts = [item.modality.name, item.format.name, layout]
    parts += [item.feature, item.precomputed_embeddings, item.model_specific_data]
    for piece in _pieces(parts):
        sha256.update(piece)
    return sha256.digest()


def _pieces(value: object) -> Iterator[bytes | memoryview]:
    """The bytes of `value`, with type and length in front: other values have other bytes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        yield f"tensor {value.dtype} {tuple(value.shape)} ".encode()
        yield flat.numpy().data
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"array {value.dtype.str} {value.shape} ".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, list | tuple):
        yield f"list {len(value)} ".encode()
        for one in value:
            yield from _pieces(one)
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        for key in sorted(value, key=repr):
            yield from _pieces(key)
            yield from _pieces(value[key])
    elif isinstance(value, bytes | str):
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        yield f"{type(value).__name__} {len(data)} ".encode() + data
    elif isinstance(value, enum.Enum):
        yield from _pieces(f"{type(value).__name__}.{value.name}")
    elif value is None or isinstance(value, bool | int | float | np.generic):
        yield from _pieces(f"{type(value).__name__} {value!r}")
    else:
        raise TypeError(f"{type(value).__name__} has no bytes to name it by.")


def inputs_of(given: MultimodalInputs, tokens: np.ndarray) -> tuple[Input, ...] | None:
    """What names the pages of a prompt of these tokens, placeholders filled in; None: nothing can.

    Placeholders must lie where the items say: elsewhere KV would come of an image, and its page
    would not be named by it.
    """
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    is_text = tokens < MM_PAD_SHIFT_VALUE
    found = []
    for item in given.mm_items:
        digest = item.__dict__.get(_DIGEST)
        if digest is None or not item.offsets:
            return None
        sha256 = hashlib.sha256(digest)
        for begin, end in sorted(item.offsets):
            if not 0 <= begin <= end < len(tokens):
                return None
            expected = request_kv.placeholders(item, end + 1 - begin)
            if not np.array_equal(tokens[begin : end + 1], expected):
                return None
            is_text[begin : end + 1] = True
            # Rotary positions depend on more than the item in some models: seconds per frame.
            if given.mrope_positions is not None:
                for piece in _pieces(given.mrope_positions[:, begin : end + 1]):
                    sha256.update(piece)
        found.append(Input(min(item.offsets)[0], sha256.digest()))
    return tuple(found) if is_text.all() else None


def paired(tokens: array[int]) -> array[int]:
    """Each of `tokens` with the one behind it, as they name pages of KV that is computed from both.

    One fewer; a token's id stays where `forest.inputs.token_ids` finds it.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    return array(TOKEN_TYPECODE, (ids[:-1] | ids[1:] << 32).tobytes())


def as_named(tokens: array[int], key: object, context: TierContext, begin: int = 0) -> array[int]:
    """`tokens` from position `begin` on as they name pages, of a prompt with this `extra_key`.

    Long placeholders all become one: what stands behind them, and where, is in the names of inputs.
    """
    if context.names_pairs:
        return paired(tokens)
    if not isinstance(key, PromptKey):
        return tokens
    words = np.minimum(np.asarray(tokens, dtype=np.int64), TOKEN_LIMIT - 1)
    return named(array(TOKEN_TYPECODE, words.tobytes()), key.inputs, context.page_size, begin)


# -- hooks ---------------------------------------------------------------------------------------


def set_pad_value(original: Callable[..., None], item: MultimodalDataItem) -> None:
    """AROUND `MultimodalDataItem.set_pad_value`, which every item passes in the scheduler.

    Nothing is wrong with it in an engine without tiers: a hash of more bits. Raises ValueError for
    what only clients can have written: features that are no tensors, on which the model would fail,
    and placeholders that are tokens of the vocabulary, which would be replaced in all prompts.
    """
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    for features in (item.feature, item.precomputed_embeddings):
        if _is_written_out(features):
            raise ValueError("features of images, videos and audio must be tensors.")
    try:
        digest = digest_of(item)
    except TypeError as error:
        item.__dict__.pop(_DIGEST, None)
        logger.warning("Tiered KV: KV of an input is not kept (%s).", error)
    else:
        item.__dict__[_DIGEST] = digest
        request_kv.name_input(item, digest)
    original(item)
    for value in request_kv.placeholder_values(item):
        if not isinstance(value, int) or not MM_PAD_SHIFT_VALUE <= value < request_kv.WORD_LIMIT:
            raise ValueError(f"pad_value {value} is not for clients to set; leave it out.")


def _is_written_out(features: object) -> bool:
    """Whether these are numbers and the like as JSON has them."""
    if isinstance(features, list | tuple):
        return any(map(_is_written_out, features))
    return isinstance(features, str | bool | int | float | Mapping)


def name_inputs(scheduler: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    """BEFORE `Scheduler._add_request_to_queue`: its `extra_key` names its inputs, too."""
    if not getattr(scheduler.server_args, "tiered_kv", False):
        return
    given = req.multimodal_inputs
    if given is None or isinstance(req.extra_key, PromptKey):
        return
    inputs = inputs_of(given, np.asarray(req.origin_input_ids))
    if inputs is not None:
        req.extra_key = PromptKey(req.extra_key or SHARED_TREE, inputs)
