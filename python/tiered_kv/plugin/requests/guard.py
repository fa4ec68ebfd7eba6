"""What a caller sends may cost the caller an error, and nobody else anything.

Two lines. At the front door, where a request has been taken apart but not been sent to the
scheduler: what SGLang trips over there is a wrong value, so it is a ValueError, which every route
answers with 400; and what SGLang lets through although no model can compute it is refused. In the
scheduler: what trips over a request while it arrives ends that request and not the server.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse

logger = logging.getLogger(__name__)

#: What Python says of a value of another type or out of range. A RecursionError is a RuntimeError.
CLIENT_FAULTS = (
    *(TypeError, KeyError, IndexError, AttributeError, AssertionError),
    *(ArithmeticError, RecursionError, NotImplementedError, UnicodeError, re.error),
)
_INT32, _INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Logits are divided by it; less makes them infinite.
LEAST_REPETITION_PENALTY = 1e-6


def _told(error: Exception) -> ValueError:
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    return ValueError(
        f"the request has a field that cannot be read ({what[:300]}); check its types and ranges."
    )


def read_client(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND a function that reads what a client sent; it may be a coroutine. Raises ValueError."""
    try:
        result = original(*args, **kwargs)
    except CLIENT_FAULTS as error:
        raise _told(error) from error
    return _read_client_later(result) if inspect.isawaitable(result) else result


async def _read_client_later(result: Any) -> Any:
    try:
        return await result
    except CLIENT_FAULTS as error:
        raise _told(error) from error


def read_batch(original: Callable[..., None], sent: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND `GenerateReqInput.normalize_batch_and_arguments`. Raises ValueError."""
    read_client(original, sent, *args, **kwargs)
    if sent.parallel_sample_num < 1:
        # SGLang would make a batch of no requests, and look for the first.
        raise ValueError(f"n must be at least 1, not {sent.parallel_sample_num}.")


#: What SGLang and transformers say of images that cannot be read, or are too few or too many.
IMAGE_FAULTS = (RuntimeError, StopIteration)


def read_images(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND a function that reads images, videos or audio; as `read_client`."""
    try:
        result = original(*args, **kwargs)
    except IMAGE_FAULTS as error:
        raise _unread(error) from error
    return _read_images_later(result) if inspect.isawaitable(result) else result


async def _read_images_later(result: Any) -> Any:
    try:
        return await result
    except IMAGE_FAULTS as error:
        raise _unread(error) from error


def _unread(error: Exception) -> ValueError:
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    return ValueError(
        f"images, videos or audio cannot be read ({what[:300]}); check them, and that there are "
        "as many as the prompt has places for."
    )


# -- routes that answer no error themselves -------------------------------------------------------

GENERATING_ROUTES = frozenset(
    (
        *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        *("/api/chat", "/api/generate", "/v1/score", "/vertex_generate", "/invocations"),
    )
)


def answer_with_400(app: Any) -> None:
    """Have `app` (FastAPI) answer what a caller's values raised on a generating route with 400."""
    for kind in (ValueError, *CLIENT_FAULTS):
        app.add_exception_handler(kind, _answer)
    app.middleware_stack = None  # built with the handlers of then; built anew when it is None


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if request.url.path not in GENERATING_ROUTES:
        raise error
    logger.warning("Tiered KV: %s cannot be read.", request.url.path, exc_info=error)
    told = error if isinstance(error, ValueError) else _told(error)
    body = {"object": "error", "message": str(told), "type": "BadRequest", "code": 400}
    return JSONResponse({**body, "error": {"message": str(told)}}, status_code=400)


async def begin_stream(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND a coroutine that returns a StreamingResponse and leaves its errors to nobody.

    The first chunk is fetched before the response begins, while there still is a status to say.
    """
    response = await original(*args, **kwargs)
    chunks = response.body_iterator
    first = await anext(chunks, None)

    async def all_chunks() -> AsyncIterator[Any]:
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk

    response.body_iterator = all_chunks()
    return response


# -- what no client has a value for ----------------------------------------------------------------

#: Fields of a body that SGLang's own processes fill in. A client's would reach the scheduler as
#: they are: another's adapter, another's socket, objects that JSON cannot write.
INTERNAL_FIELDS = (
    *("http_worker_ipc", "lora_id", "positional_embed_overrides", "num_items_assigned"),
    *("mm_data_mooncake", "need_wait_for_mm_inputs", "encoder_urls", "decode_tp_size"),
)


def refuse_internal_fields(body: object) -> None:
    """Raises ValueError if a decoded JSON body names a field that is not for clients."""
    if not isinstance(body, Mapping):
        return
    for holder in (body, body.get("parameters")):
        for field in INTERNAL_FIELDS:
            if isinstance(holder, Mapping) and holder.get(field) is not None:
                raise ValueError(f"{field} is not for clients to set; leave it out.")


# -- what no model can compute ---------------------------------------------------------------------


def check_tokenized(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `TokenizerManager._create_tokenized_object`, which each row of a batch goes through.

    Raises ValueError.
    """
    tokenized = read_client(original, manager, obj, *args, **kwargs)
    vocabulary = manager.model_config.vocab_size
    if tokenized.input_ids is not None:
        check_prompt(tokenized.input_ids, vocabulary)
    check_sampling(tokenized.sampling_params, vocabulary)
    check_labels(getattr(obj, "custom_labels", None), manager.server_args)
    return tokenized


def check_prompt(ids: Sequence[int], vocabulary: int) -> None:
    """Raises ValueError unless there are token ids and all are of the vocabulary.

    ids: anything that numpy takes for integers of 64 bits.
    """
    if not len(ids):
        raise ValueError("the prompt has no tokens; send at least one.")
    values = np.asarray(ids)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"the prompt has the token id {wrong}, but the model's are 0 to {vocabulary - 1}."
        )


def check_sampling(sampling: Any, vocabulary: int) -> None:
    """Raises ValueError for types and numbers that would only fail in the scheduler.

    sampling: upstream's SamplingParams, normalised and verified by it. SGLang makes it out of
    whatever was sent and puts its numbers into tensors of 32 bits, the seed into one of 64.
    """
    for field in msgspec.structs.fields(sampling):
        value = getattr(sampling, field.name)
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            raise ValueError(f"{field.name}: {error}.") from None
        bounds = _INT64 if field.name == "sampling_seed" else _INT32
        if isinstance(value, int) and not bounds.min <= value <= bounds.max:
            raise ValueError(f"{field.name} must fit {bounds.bits} bits, not {str(value)[:60]}.")
    for name, number in _floats(sampling):
        if not abs(number) <= _FLOAT32_MAX:
            raise ValueError(f"{name} must be a number that fits 32 bits, not {number:g}.")
    if sampling.repetition_penalty < LEAST_REPETITION_PENALTY:
        raise ValueError(
            f"repetition_penalty must be at least {LEAST_REPETITION_PENALTY:g}, not "
            f"{sampling.repetition_penalty:g}."
        )
    if (getattr(sampling, "beam_width", None) or 1) > 1:
        raise ValueError("beam_width must be 1: beams do not go with --tiered-kv.")
    for token in sampling.stop_token_ids or ():
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"stop_token_ids has {token}, but the model's token ids are 0 to {vocabulary - 1}."
            )


def _floats(sampling: Any) -> Iterator[tuple[str, float]]:
    for field in msgspec.structs.fields(sampling):
        value = getattr(sampling, field.name)
        if isinstance(value, float):
            yield field.name, value
    for token, bias in (sampling.logit_bias or {}).items():
        yield f"logit_bias of {str(token)[:20]}", bias


def check_labels(labels: Mapping[str, str] | None, server_args: Any) -> None:
    """Raises ValueError for labels of metrics that the server was not told of.

    Prometheus' client refuses them when the first token comes, in the loop that all answers pass.
    """
    allowed = server_args.tokenizer_metrics_allowed_custom_labels or ()
    for label in labels or ():
        if label not in allowed:
            raise ValueError(
                f"custom_labels has {str(label)[:60]}, which is not among the server's "
                "--tokenizer-metrics-allowed-custom-labels."
            )


def check_score(manager: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `TokenizerManager.score_request`. Raises ValueError.

    Without a label the scheduler returns no probabilities, and SGLang reads the first.
    """
    if not kwargs.get("label_token_ids"):
        raise ValueError("label_token_ids must name at least one token.")


# -- the scheduler ---------------------------------------------------------------------------------


def contain_arrival(
    original: Callable[..., Any], scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `Scheduler.handle_generate_request`: a request that cannot be taken in is aborted.

    All ranks are given the same request and meet the same error, so none goes on without the other.
    """
    try:
        return original(scheduler, recv_req, *args, **kwargs)
    except Exception as error:
        logger.exception("Tiered KV: request %s could not be taken in.", recv_req.rid)
        _turn_away(scheduler, recv_req, error)
        return None


def _turn_away(scheduler: Any, recv_req: Any, error: Exception) -> None:
    from sglang.srt.managers.io_struct import AbortReq

    rid = recv_req.rid
    scheduler.waiting_queue = [req for req in scheduler.waiting_queue if req.rid != rid]
    reason = {
        "type": "abort",
        "status_code": HTTPStatus.BAD_REQUEST,
        "message": f"the request could not be taken in: {type(error).__name__}: {error}"[:400],
    }
    scheduler.ipc_channels.send_to_tokenizer.send_output(
        AbortReq(finished_reason=reason, rid=rid), recv_req
    )
