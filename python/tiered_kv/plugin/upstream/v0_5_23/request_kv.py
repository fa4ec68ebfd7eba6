"""Where SGLang 0.5.23 keeps a request's KV (`Req.kv`), and how that is kept or given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiered_kv.core.ids import Tier

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem, Req

#: Placeholders of images are below it. They are 62 bits above the token ids.
WORD_LIMIT = 1 << 63


def holds_kv(req: Req) -> bool:
    """Whether `req` has slots on the device."""
    return bool(req.kv.holds_kv)


def row_of(req: Req) -> int:
    """Its row of `req_to_token`; it must hold KV."""
    row: int = req.kv.req_pool_idx
    return row


def committed_tokens(req: Req) -> int:
    """Tokens whose KV it has, or will have when the pass that was launched last is over."""
    n_tokens: int = req.kv.kv_committed_len
    return n_tokens


def forget_beyond(req: Req, n_tokens: int) -> None:
    """Its KV ends after `n_tokens` now; the slots beyond are not its own any more."""
    req.kv.kv_committed_len = req.kv.kv_allocated_len = n_tokens


def prefix_tokens(req: Req) -> int:
    """Tokens from the start that need not be computed: cached ones, or earlier chunks."""
    n_tokens: int = req.prefix_len
    return n_tokens


def extend_tokens(req: Req) -> int:
    """Tokens that its current chunk computes."""
    n_tokens: int = req.extend_len
    return n_tokens


def state_record(req: Req) -> Any:
    """What says which slot of the pool of recurrent states `req` has, if it has one."""
    return req.kv


def prefix_identity(req: Req) -> object:
    """An object that is the same one as long as its prefix stays in the same slots.

    Pages leave the device from the end of a prefix, so those of its last node tell of all.
    """
    node = req.last_node
    return None if node is None or node.is_root else node.slots(Tier.DEVICE)


def give_back(req: Req, tree_cache: Any) -> None:
    """Takes all slots from `req`; what is not cached yet is lost."""
    from sglang.srt.mem_cache.common import release_kv_cache

    release_kv_cache(req, tree_cache, checkpoint=False)


def keep(req: Req, tree_cache: Any) -> None:
    """Takes all slots from `req`, which is not finished; its whole pages become cache."""
    req.refresh_fill_ids()
    if not req.skip_radix_cache_insert:
        # Not while it is released, which SGLang's tree of recurrent states could not do.
        tree_cache.checkpoint(req, up_to=req.owned_kv_len())
    give_back(req, tree_cache)


def separate_salt(req: Req) -> str | None:
    """A salt that reached the scheduler apart from `extra_key`."""
    salt: str | None = req.cache_salt
    return salt


def name_input(item: MultimodalDataItem, digest: bytes) -> None:
    """Have SGLang tell images apart by 32 bytes; what stands in a prompt already stays.

    Of encoded images SGLang knows 8 of them.
    """
    if item.pad_value is None:
        item.set_identity(digest)
    else:
        item.hash = int.from_bytes(digest[:8], "big")


def placeholders(item: MultimodalDataItem, n_tokens: int) -> list[int]:
    """What stands in a prompt for `n_tokens` of an image in a row."""
    sequence: list[int] = item.padding_sequence(n_tokens)
    return sequence


def placeholder_values(item: MultimodalDataItem) -> tuple[Any, ...]:
    """Those of an image, each once."""
    values: tuple[Any, ...] = item.padding_values()
    return values
