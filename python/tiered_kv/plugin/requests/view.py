"""What the other rooms want to know of one of SGLang's requests, and what we keep on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiered_kv.api.report import RequestReport
from tiered_kv.api.terms import Terms
from tiered_kv.forest.inputs import PromptKey
from tiered_kv.scheduler.request import QueuedRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: The attributes of SGLang's request under which ours are kept.
TERMS = "tiered_kv_terms"
REPORT = "tiered_kv_report"
QUEUED = "tiered_kv_queued"
STORE_TOKENS = "tiered_kv_store_tokens"

_NO_TERMS = Terms()


def terms_of(req: Req) -> Terms:
    """What `req` was promised."""
    terms: Terms = getattr(req, TERMS, _NO_TERMS)
    return terms


def report_of(req: Req) -> RequestReport | None:
    """The report that `req` asked for, if it did."""
    report: RequestReport | None = getattr(req, REPORT, None)
    return report


def queued_of(req: Req) -> QueuedRequest:
    """`req` as a policy sees it, from its first arrival in the queue on."""
    queued: QueuedRequest = getattr(req, QUEUED)
    return queued


def note_store_tokens(req: Req, n_tokens: int) -> None:
    """So many tokens of its prompt were read from the shared store."""
    setattr(req, STORE_TOKENS, n_tokens)


def store_tokens(req: Req) -> int:
    """Of `req.cached_tokens_storage`, those that came from the shared store; the rest from disk."""
    return min(req.cached_tokens_storage, getattr(req, STORE_TOKENS, 0))


def is_aborted(req: Req) -> bool:
    """Whether `req` ended, or is about to, without its answer."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason or req.to_finish, FINISH_ABORT)


def ending_of(req: Req) -> tuple[int, ...] | None:
    """The last tokens of an answer that the model ended; None if its length did.

    With them a model says whether it calls a tool or is done: an end of message instead of an end
    of turn, or what closes the call before that.
    """
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH

    if isinstance(req.finished_reason, FINISH_LENGTH):
        return None
    return tuple(req.output_ids[-2:])


def is_probe(req: Req) -> bool:
    """Whether `req` is a health check's: nobody was promised anything, and nobody counts it."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    return req.rid.startswith(HEALTH_CHECK_RID_PREFIX)


def is_named(req: Req) -> bool:
    """Whether a prompt's KV depends on its token ids alone, and on inputs that have a name.

    Embeddings given by the client override those of the tokens. Upstream does not match such
    prompts, but inserts what they computed; on disk that would outlive the request's own error.
    """
    if req.positional_embed_overrides is not None or req.input_embeds is not None:
        return False
    return req.multimodal_inputs is None or isinstance(req.extra_key, PromptKey)
