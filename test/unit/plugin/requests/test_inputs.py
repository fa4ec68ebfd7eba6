"""Names of images: by all that the model is given of them, whatever a client calls them."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import (
    MM_PAD_SHIFT_VALUE,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)

from tiered_kv.forest.inputs import TOKEN_LIMIT, PromptKey, token_ids
from tiered_kv.forest.key import SHARED_TREE, TreeKey
from tiered_kv.plugin.requests import inputs
from tiered_kv.plugin.upstream.current import request_kv

SCHEDULER = SimpleNamespace(server_args=SimpleNamespace(tiered_kv=True))


def stock() -> Callable[..., None]:
    """SGLang's own. Another test may have installed the hooks, which replaces a function wherever
    a module has it by a name, here as well."""
    found: Callable[..., None] = inspect.unwrap(MultimodalDataItem.set_pad_value)
    return found


def item(**changes: Any) -> MultimodalDataItem:
    """An image of eight by eight patches, on the tokens 20 to 35."""
    pixels = torch.arange(64 * 12, dtype=torch.float32).reshape(64, 12)
    fields: dict[str, Any] = {"modality": Modality.IMAGE, "offsets": [(20, 35)], "feature": pixels}
    fields["model_specific_data"] = {"image_grid_thw": torch.tensor([[1, 8, 8]])}
    return MultimodalDataItem(**{**fields, **changes})


def arrived(one: MultimodalDataItem) -> MultimodalDataItem:
    inputs.set_pad_value(stock(), one)
    return one


def request(*items: MultimodalDataItem, n: int = 64, **fields: Any) -> Any:
    """A request of `n` tokens whose items have arrived, placeholders filled in."""
    tokens = array("q", range(n))
    for one in items:
        for begin, end in one.offsets:
            tokens[begin : end + 1] = array("q", request_kv.placeholders(one, end + 1 - begin))
    positions = torch.arange(n).expand(3, n)
    given = MultimodalInputs(mm_items=list(items), mrope_positions=positions)
    defaults = {"multimodal_inputs": given, "extra_key": None, "origin_input_ids": tokens}
    return SimpleNamespace(**{**defaults, **fields})


def key_of(req: Any) -> Any:
    inputs.name_inputs(SCHEDULER, req)
    return req.extra_key


BLACK = torch.zeros(64, 12)
OTHERS = {
    "one pixel": {"feature": item().feature + torch.eye(64, 12) * 1e-6},
    "type": {"feature": item().feature.to(torch.float64)},
    "an array": {"feature": item().feature.numpy()},
    "modality": {"modality": Modality.VIDEO},
    "grid": {"model_specific_data": {"image_grid_thw": torch.tensor([[1, 4, 16]])}},
    "more": {"model_specific_data": {**item().model_specific_data, "scale": 2}},
    "embeddings": {"feature": None, "precomputed_embeddings": item().feature},
    "layout": {"offsets": [(20, 27), (30, 37)]},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_whatever_differs_is_another_image(changes: dict[str, Any]) -> None:
    assert arrived(item(**changes)).hash != arrived(item()).hash


def test_equal_images_are_one_wherever_they_are() -> None:
    elsewhere = arrived(item(offsets=[(40, 55)]))
    assert elsewhere.hash == arrived(item()).hash
    assert elsewhere.pad_value == arrived(item()).pad_value
    first, second = key_of(request(arrived(item()))), key_of(request(arrived(item())))
    assert first == second
    assert first.inputs[0].start == 20


def test_sglangs_own_hash_takes_shapes_for_one() -> None:
    """Why it is not used: black images of as many patches are equal bytes."""
    shapes = [[1, 8, 8], [1, 4, 16]]
    black = [
        item(feature=BLACK, model_specific_data={"image_grid_thw": torch.tensor([shape])})
        for shape in shapes
    ]
    for one in black:
        stock()(one)
    assert black[0].hash == black[1].hash
    fresh = [item(feature=BLACK, model_specific_data=one.model_specific_data) for one in black]
    assert arrived(fresh[0]).hash != arrived(fresh[1]).hash


def test_what_a_client_calls_an_image_is_not_its_name() -> None:
    called = [item(feature=item().feature + i) for i in range(2)]
    for one in called:
        one.set_hash(1234)
        arrived(one)
    assert called[0].pad_value == called[1].pad_value, "SGLang's router may count on it"
    assert called[0].hash != called[1].hash
    keys = [key_of(request(one)) for one in called]
    assert keys[0] != keys[1]


def test_names_go_with_salts() -> None:
    salted = TreeKey(salt=b"s" * 32)
    key = key_of(request(arrived(item()), extra_key=salted))
    assert key.tree == salted
    assert key_of(request(arrived(item()))).tree == SHARED_TREE
    req = request(arrived(item()))
    assert key_of(req) is key_of(req), "a request that comes back keeps its name"


def test_positions_count() -> None:
    """Of a video they depend on its seconds per frame, which are in no item."""
    req = request(arrived(item()))
    req.multimodal_inputs.mrope_positions = torch.arange(64).expand(3, 64) * 2
    assert key_of(req) != key_of(request(arrived(item())))


@pytest.mark.parametrize("where", [19, 36, 63])
def test_a_placeholder_elsewhere_has_no_name(where: int) -> None:
    req = request(arrived(item()))
    req.origin_input_ids[where] = req.origin_input_ids[20]
    assert key_of(req) is None


@pytest.mark.parametrize("offsets", [None, [], [(19, 34)], [(60, 75)], [(-1, 3)], [(35, 20)]])
def test_an_item_that_is_elsewhere_has_no_name(offsets: Any) -> None:
    req = request(arrived(item()))
    req.multimodal_inputs.mm_items[0].offsets = offsets
    assert key_of(req) is None


def test_what_cannot_be_read_has_no_name() -> None:
    odd = item(model_specific_data={"odd": object()})
    arrived(odd)
    assert key_of(request(odd)) is None
    assert odd.pad_value >= MM_PAD_SHIFT_VALUE, "it is served all the same"


def test_a_digest_that_a_client_sends_is_none() -> None:
    odd = item(model_specific_data={"odd": object(), "tiered_kv_digest": b"x" * 32})
    arrived(odd)
    assert key_of(request(odd)) is None


@pytest.mark.parametrize("features", [[[0.0] * 12] * 64, "pixels", 5, {"a": 1}, [{}]], ids=str)
def test_features_as_json_has_them_are_refused(features: Any) -> None:
    for name in ("feature", "precomputed_embeddings"):
        with pytest.raises(ValueError, match="must be tensors"):
            arrived(item(**{"feature": None, name: features}))


@pytest.mark.parametrize("placeholder", [5, -1, request_kv.WORD_LIMIT, MM_PAD_SHIFT_VALUE - 1])
def test_placeholders_that_clients_choose_are_refused(placeholder: int) -> None:
    with pytest.raises(ValueError, match="not for clients"):
        arrived(item(pad_value=placeholder))


def test_text_is_left_alone() -> None:
    req = request(multimodal_inputs=None)
    assert key_of(req) is None
    tokens = req.origin_input_ids
    context: Any = SimpleNamespace(page_size=16, names_pairs=False)
    assert inputs.as_named(tokens, None, context) is tokens
    assert inputs.as_named(tokens, TreeKey(), context) is tokens


def test_where_a_draft_has_kv_tokens_name_pages_with_those_behind_them() -> None:
    context: Any = SimpleNamespace(page_size=16, names_pairs=True)
    tokens = array("q", [5, 6, TOKEN_LIMIT - 1, 7])
    words = inputs.as_named(tokens, None, context)
    assert len(words) == len(set(words)) == 3
    assert token_ids(words) == [5, 6, TOKEN_LIMIT - 1]
    assert inputs.as_named(tokens[1:], None, context, 16) == words[1:]
    assert inputs.as_named(tokens[:2] + tokens[3:], None, context)[0] == words[0]
    assert inputs.as_named(tokens[:1] + tokens[2:], None, context)[0] != words[0]
    for few in (tokens[:0], tokens[:1]):
        assert not len(inputs.as_named(few, None, context))


def test_a_server_without_tiers_is_left_alone() -> None:
    stock = SimpleNamespace(server_args=SimpleNamespace())
    req = request(arrived(item()))
    inputs.name_inputs(stock, req)
    assert req.extra_key is None
    assert isinstance(key_of(req), PromptKey)


def test_kinds_of_values_are_told_apart() -> None:
    values: list[Any] = [
        *(None, True, 1, 1.0, "1", b"1", [1], [[1]], {"a": 1}, {"b": 1}, [1, 1], "", b""),
        *(torch.tensor([1]), torch.tensor([[1]]), np.array([1]), np.array([1], dtype=np.int32)),
        *(torch.tensor([1], dtype=torch.bfloat16), np.float32(1), Modality.IMAGE),
    ]
    names = {arrived(item(model_specific_data={"value": value})).hash for value in values}
    assert len(names) == len(values)


def test_words_keep_token_ids_and_where_placeholders_are() -> None:
    context: Any = SimpleNamespace(page_size=16, names_pairs=False)
    req = request(arrived(item()))
    words = inputs.as_named(req.origin_input_ids, key_of(req), context)
    shown = token_ids(words)
    assert shown[:20] == list(range(20))
    assert shown[36:] == list(range(36, 64))
    assert all(MM_PAD_SHIFT_VALUE <= word < TOKEN_LIMIT for word in shown[20:36])
    other = request(arrived(item(feature=BLACK)))
    assert inputs.as_named(other.origin_input_ids, key_of(other), context)[16:32] != words[16:32]
    assert req.origin_input_ids[20:36].tolist() == request_kv.placeholders(
        req.multimodal_inputs.mm_items[0], 16
    ), "SGLang finds the image by them"
