"""Valkey or Redis as a store of blobs: one string for each.

What stays is the server's own affair: give it `maxmemory` and `maxmemory-policy allkeys-lru`, or it
says that it is full.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import valkey
from valkey.backoff import NoBackoff
from valkey.retry import Retry

from tiered_kv.tiers.shared.address import PASSWORD_VARIABLE, StoreAddress
from tiered_kv.tiers.shared.blobs import Pieces, StoreFullError

_PREFIX = "tiered-kv:"


class ValkeyBlobs:
    """A client of the server at `address`. It connects when it is first needed.

    deadline_s: what connecting, or waiting for more of an answer, may take.
    """

    def __init__(self, address: StoreAddress, deadline_s: float) -> None:
        self.name = address.name
        ttl_s = address.parameters.get("ttl")
        self._ttl_ms = None if ttl_s is None else max(1, int(ttl_s * 1000))
        self._client = valkey.Valkey(
            host=address.host,
            port=address.port,
            db=address.database,
            username=address.user,
            password=os.environ.get(PASSWORD_VARIABLE) or None,
            ssl=address.is_encrypted,
            # By default the client takes any certificate that some authority has signed.
            ssl_check_hostname=True,
            ssl_ca_certs=address.parameters.get("ca"),
            socket_timeout=deadline_s,
            socket_connect_timeout=deadline_s,
            socket_keepalive=True,
            # A server that was restarted has closed the connections of before.
            retry=Retry(NoBackoff(), 1, supported_errors=(valkey.ConnectionError,)),
            retry_on_error=[valkey.ConnectionError],
        )

    def memory(self, n_bytes: int) -> memoryview:
        return memoryview(bytearray(n_bytes))

    def exist(self, keys: Sequence[str]) -> list[bool]:
        return self._which(keys, lambda pipeline, names: pipeline.exists(*names))

    def touch(self, keys: Sequence[str]) -> list[bool]:
        return self._which(keys, lambda pipeline, names: pipeline.touch(*names))

    def _which(self, keys: Sequence[str], count: Callable[[Any, list[str]], Any]) -> list[bool]:
        """Which of the keys are there, of a command that says how many of several are.

        Of a prompt mostly all, or all up to some page, are: halves that are neither full nor empty
        are asked for again, all at once.
        """
        names = [_PREFIX + key for key in keys]
        are_there = [False] * len(names)
        unknown = [(0, len(names))] if names else []
        while unknown:
            pipeline = self._client.pipeline(transaction=False)
            for start, stop in unknown:
                count(pipeline, names[start:stop])
            halves = []
            for (start, stop), n_there in zip(unknown, pipeline.execute(), strict=True):
                if n_there == stop - start:
                    are_there[start:stop] = [True] * n_there
                elif n_there:
                    middle = (start + stop) // 2
                    halves += [(start, middle), (middle, stop)]
            unknown = halves
        return are_there

    def read(self, keys: Sequence[str], blobs: Sequence[Pieces]) -> list[int]:
        values: list[bytes | None] = self._client.mget([_PREFIX + key for key in keys])
        return [
            -1 if value is None else _spread(value, pieces)
            for value, pieces in zip(values, blobs, strict=True)
        ]

    def write(
        self, keys: Sequence[str], blobs: Sequence[Pieces], replaced: Sequence[bool]
    ) -> list[bool]:
        del replaced  # `SET` replaces.
        pipeline = self._client.pipeline(transaction=False)
        for key, pieces in zip(keys, blobs, strict=True):
            pipeline.set(_PREFIX + key, b"".join(pieces), px=self._ttl_ms)
        answers = pipeline.execute(raise_on_error=False)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if len(errors) == len(answers) and errors:
            raise _meant(errors[0])
        return [not isinstance(answer, Exception) for answer in answers]

    def remove(self, keys: Sequence[str]) -> int:
        return int(self._client.unlink(*(_PREFIX + key for key in keys)))

    def close(self) -> None:
        self._client.close()


def _spread(value: bytes, pieces: Pieces) -> int:
    """`value` over the pieces, as far as they reach."""
    whole, at = memoryview(value), 0
    for piece in pieces:
        part = whole[at : at + len(piece)]
        piece[: len(part)] = part
        at += len(piece)
    return len(value)


def _meant(error: Exception) -> Exception:
    if isinstance(error, valkey.exceptions.OutOfMemoryError) or "OOM" in str(error):
        return StoreFullError("it is full: give it `maxmemory-policy allkeys-lru` or more memory")
    return error
