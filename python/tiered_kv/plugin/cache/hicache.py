"""SGLang's own storage backends (`HiCacheStorage`) as stores of blobs: 3FS, NIXL, AIBrix and so on.

A backend moves pages between a host pool and its store. Ours are of another make, and each carries
a header, so the backend is given a small pool of its own whose "pages" are whole blobs, of one
token each; they are copied there and back. It is told of an MLA model on one rank, for which a page
is one object under the name that it is given: our names say already which model, rank and page.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.storage import StorageBackendFactory

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.shared.address import StoreAddress
from tiered_kv.tiers.shared.blobs import Pieces

logger = logging.getLogger(__name__)

#: Blobs that one call of a backend moves.
ROWS = 32
#: Those that move pages by their place in the pool (managers/cache_controller.py), not by tensors.
BY_INDEX = frozenset({"hf3fs", "mooncake", "eic", "nixl", "simm", "mori"})
_MISUSE = (ImportError, ValueError, TypeError, AttributeError, KeyError)


class BlobPool:
    """What backends use of SGLang's host pools, over `n_rows` blobs of one "token" each."""

    layout = "page_first"
    page_size = 1
    dtype = torch.uint8
    pin_memory = False
    device = "cpu"

    def __init__(self, n_rows: int, blob_bytes: int) -> None:
        self.kv_buffer = torch.zeros((n_rows, blob_bytes), dtype=torch.uint8)
        self.size = n_rows
        self._blob_bytes = blob_bytes

    def get_ksize_per_token(self) -> int:
        return self._blob_bytes

    get_size_per_token = get_ksize_per_token

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pointers = [self.kv_buffer[int(index)].data_ptr() for index in indices]
        return pointers, [self._blob_bytes] * len(pointers)

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        return self.kv_buffer[int(index)]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self._blob_bytes, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self.kv_buffer[int(index)] = data_page

    def is_stride_page_aligned(self, alignment: int) -> bool:
        return self._blob_bytes % alignment == 0 and self.kv_buffer.data_ptr() % alignment == 0


class HiCacheBlobs:
    """A client of SGLang's backend `address.backend`, for blobs of `blob_bytes`.

    Raises ConfigError if SGLang knows no such backend, or it cannot be made of what it was given.
    """

    def __init__(self, address: StoreAddress, blob_bytes: int) -> None:
        self.name = address.name
        self._address = address
        self._blob_bytes = blob_bytes
        extra = address.parameters["extra_config"]
        is_by_index = address.backend == "dynamic" and bool(extra.get("interface_v1"))
        self._moves_by_index = is_by_index or address.backend in BY_INDEX
        # Half of it is read into, the other half written from.
        self._pool = BlobPool(2 * ROWS, blob_bytes)
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._making = threading.Lock()
        self._made: Any = None
        try:
            self._backend()
        except _MISUSE as error:
            raise ConfigError(
                f"--tiered-kv-store {self.name} cannot be used ({error}); name one of SGLang's "
                "storage backends that is installed, with the JSON that it needs."
            ) from error
        except Exception as error:
            logger.warning("Store %s is not there yet (%s); it is tried again.", self.name, error)

    def _backend(self) -> Any:
        with self._making:
            if self._made is None:
                config = HiCacheStorageConfig(
                    tp_rank=0,
                    tp_size=1,
                    pp_rank=0,
                    pp_size=1,
                    attn_cp_rank=0,
                    attn_cp_size=1,
                    is_mla_model=True,
                    enable_storage_metrics=False,
                    is_page_first_layout=True,
                    model_name="tiered-kv",
                    extra_config=dict(self._address.parameters["extra_config"]),
                )
                made = StorageBackendFactory.create_backend(
                    self._address.backend, config, self._pool
                )
                made.register_mem_pool_host(self._pool)
                self._made = made
            return self._made

    def memory(self, n_bytes: int) -> memoryview:
        return memoryview(bytearray(n_bytes))

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """What comes after one that is not there is not asked for: backends count leading ones."""
        n_there = int(self._backend().batch_exists(list(keys)))
        return [n < n_there for n in range(len(keys))]

    def touch(self, keys: Sequence[str]) -> list[bool]:
        # Not by `exists`, which some backends ask under another name than they store.
        backend, are_there = self._backend(), [False] * len(keys)
        at = 0
        while at < len(keys):
            n_there = int(backend.batch_exists(list(keys[at:])))
            are_there[at : at + n_there] = [True] * n_there
            at += n_there + 1
        return are_there

    def read(self, keys: Sequence[str], blobs: Sequence[Pieces]) -> list[int]:
        sizes: list[int] = []
        with self._reading:
            for at in range(0, len(keys), ROWS):
                some = list(keys[at : at + ROWS])
                for row, came in enumerate(self._get(some)):
                    if came:
                        _spread(self._pool.kv_buffer[row], blobs[at + row])
                    sizes.append(self._blob_bytes if came else -1)
        return sizes

    def _get(self, keys: list[str]) -> list[bool]:
        """Which came, each into the row of its number."""
        backend = self._backend()
        if self._moves_by_index:
            return [bool(came) for came in backend.batch_get_v1(keys, torch.arange(len(keys)))]
        rows = [self._pool.kv_buffer[row] for row in range(len(keys))]
        try:
            found = backend.batch_get(keys, rows) or [None] * len(keys)
        except Exception:
            # Of one that is no blob of ours some backends say so for all.
            found = [_alone(backend, key, row) for key, row in zip(keys, rows, strict=True)]
            if not any(one is not None for one in found) and len(keys) > 1:
                raise
        for row, one in zip(rows, found, strict=True):
            if one is not None and one.data_ptr() != row.data_ptr():
                row.copy_(one.reshape(-1).view(torch.uint8))
        return [one is not None for one in found]

    def write(
        self, keys: Sequence[str], blobs: Sequence[Pieces], replaced: Sequence[bool]
    ) -> list[bool]:
        """What a backend cannot delete it cannot replace: that stays, and is not stored."""
        backend = self._backend()
        delete = getattr(backend, "delete", None)
        for key, is_old in zip(keys, replaced, strict=True):
            if is_old and delete is not None:
                delete(key)
        stored: list[bool] = []
        with self._writing:
            for at in range(0, len(keys), ROWS):
                some = list(keys[at : at + ROWS])
                for row in range(len(some)):
                    _gather(blobs[at + row], self._pool.kv_buffer[ROWS + row])
                stored += self._set(backend, some)
        return [
            is_stored and (not is_old or delete is not None)
            for is_stored, is_old in zip(stored, replaced, strict=True)
        ]

    def _set(self, backend: Any, keys: list[str]) -> list[bool]:
        rows = torch.arange(ROWS, ROWS + len(keys))
        if self._moves_by_index:
            return [bool(is_stored) for is_stored in backend.batch_set_v1(keys, rows)]
        values = [self._pool.kv_buffer[row] for row in rows]
        return [bool(backend.batch_set(keys, values))] * len(keys)

    def remove(self, keys: Sequence[str]) -> int:
        """What a backend cannot delete stays."""
        backend = self._backend()
        delete = getattr(backend, "delete", None)
        if delete is None:
            return 0
        for key in keys:
            delete(key)
        return len(keys)

    def close(self) -> None:
        close = getattr(self._made, "close", None)
        if close is not None:
            close()


def _alone(backend: Any, key: str, row: torch.Tensor) -> torch.Tensor | None:
    try:
        found: torch.Tensor | None = backend.get(key, row)
    except Exception:
        return None
    return found


def _spread(row: torch.Tensor, pieces: Pieces) -> None:
    whole, at = memoryview(row.numpy()), 0
    for piece in pieces:
        piece[:] = whole[at : at + len(piece)]
        at += len(piece)


def _gather(pieces: Pieces, row: torch.Tensor) -> None:
    whole, at = memoryview(row.numpy()), 0
    for piece in pieces:
        whole[at : at + len(piece)] = piece
        at += len(piece)
