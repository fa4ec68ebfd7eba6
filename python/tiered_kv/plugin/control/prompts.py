"""The tokens that an order is about, as SGLang's own routes would have them."""

from __future__ import annotations

from array import array
from typing import Any

from pydantic import ValidationError

from tiered_kv.api.cache_order import CacheOrder
from tiered_kv.api.fields import TermsError, shortened

NO_TOKENIZER = "This server has no tokenizer (--skip-tokenizer-init); give token_ids."
IMAGES = (
    "messages with images, sounds or videos are known by more than their tokens; name the session "
    "instead."
)


async def tokens_of(order: CacheOrder, manager: Any, chat: Any, raw_request: Any) -> array[int]:
    """Of an order that names a prompt. chat: SGLang's chat route. Raises TermsError."""
    ids: Any = order.token_ids
    if ids is None:
        if manager.tokenizer is None:
            raise TermsError(NO_TOKENIZER)
        try:
            text = order.text
            if order.messages is not None:
                text, ids = _of_messages(order, chat, raw_request)
            if ids is None:
                ids, _ = await manager._tokenize_texts(text)
        except TermsError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Whatever a tokenizer or a template makes of what a stranger sent.
            raise TermsError(_sentence(order, error)) from None
    if len(ids) > manager.context_len:
        raise TermsError(
            f"The prompt has {len(ids)} tokens, and no request of this server can have more than "
            f"{manager.context_len}; shorten it."
        )
    return array("q", ids)


def _of_messages(
    order: CacheOrder, chat: Any, raw_request: Any
) -> tuple[str | None, list[int] | None]:
    """The text or the tokens that the chat route makes of them."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(messages=order.messages, **order.chat)
    adapted, _ = chat._convert_to_internal_request(request, raw_request)
    if any((adapted.image_data, adapted.audio_data, adapted.video_data)):
        raise TermsError(IMAGES)
    return adapted.text, adapted.input_ids


def _sentence(order: CacheOrder, error: Exception) -> str:
    what = "text" if order.messages is None else "messages"
    why = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"][:3]))
        why = str(first["msg"])
    return f"{what} cannot be made a prompt of: {shortened(why.splitlines()[0] if why else error)}."
