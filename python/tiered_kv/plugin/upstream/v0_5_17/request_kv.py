"""Where SGLang 0.5.17 keeps a request's KV, and how that is kept or given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem, Req

#: Placeholders of images are below it. They are 30 bits above the token ids.
WORD_LIMIT = 1 << 31


def holds_kv(req: Req) -> bool:
    """Whether `req` has slots on the device."""
    return req.req_pool_idx is not None


def row_of(req: Req) -> int:
    """Its row of `req_to_token`; it must hold KV."""
    row: int = req.req_pool_idx
    return row


def committed_tokens(req: Req) -> int:
    """Tokens whose KV it has, or will have when the pass that was launched last is over."""
    n_tokens: int = req.kv_committed_len
    return n_tokens


def forget_beyond(req: Req, n_tokens: int) -> None:
    """Its KV ends after `n_tokens` now; the slots beyond are not its own any more."""
    req.kv_committed_len = req.kv.kv_allocated_len = n_tokens


def prefix_tokens(req: Req) -> int:
    """Tokens from the start that need not be computed: cached ones, or earlier chunks."""
    return len(req.prefix_indices)


def extend_tokens(req: Req) -> int:
    """Tokens that its current chunk computes."""
    n_tokens: int = req.extend_range.length
    return n_tokens


def state_record(req: Req) -> Any:
    """What says which slot of the pool of recurrent states `req` has, if it has one."""
    return req


def prefix_identity(req: Req) -> object:
    """An object that is the same one as long as its prefix stays in the same slots."""
    return req.prefix_indices


def give_back(req: Req, tree_cache: Any) -> None:
    """Takes all slots from `req`; what is not cached yet is lost."""
    from sglang.srt.mem_cache.common import release_kv_cache

    release_kv_cache(req, tree_cache, is_insert=False)


def keep(req: Req, tree_cache: Any) -> None:
    """Takes all slots from `req`, which is not finished; its whole pages become cache."""
    from sglang.srt.mem_cache.common import maybe_cache_unfinished_req

    req._refresh_fill_ids()
    req.set_extend_range(0, req.effective_kv_committed_len())
    maybe_cache_unfinished_req(req, tree_cache, chunked=True)
    give_back(req, tree_cache)


def separate_salt(req: Req) -> str | None:
    """A salt that reached the scheduler apart from `extra_key`; there is no such field."""
    return None


def name_input(item: MultimodalDataItem, digest: bytes) -> None:
    """Have SGLang tell images apart by 32 bytes; what stands in a prompt already stays."""
    name = int.from_bytes(digest, "little")
    if item.pad_value is None:
        item.set_hash(name)
    else:
        item.hash = name


def placeholders(item: MultimodalDataItem, n_tokens: int) -> list[int]:
    """What stands in a prompt for `n_tokens` of an image in a row."""
    return [item.pad_value] * n_tokens


def placeholder_values(item: MultimodalDataItem) -> tuple[Any, ...]:
    """Those of an image, each once."""
    return (item.pad_value,)
