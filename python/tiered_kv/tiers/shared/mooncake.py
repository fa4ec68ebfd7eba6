"""Mooncake Store as a store of blobs, through its own client: pages go from and to the host pool.

Over TCP or RDMA, without a copy of ours in between. What was found of it (docs/cluster.md): setting
up blocks for as long as there is no master, so that is done on a thread of its own; a read that
outlasted its lease says so although all arrived, and whoever asked checks that; a store that makes
room refuses some writes meanwhile; an owner of memory that dies is known as dead seconds later.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.shared.address import StoreAddress
from tiered_kv.tiers.shared.blobs import Pieces, StoreFullError

logger = logging.getLogger(__name__)

_PREFIX = "tiered-kv:"
#: What the client's buffer takes, which reads and writes into registered memory do without.
_LOCAL_BUFFER_BYTES = 16 << 20
#: Pauses between attempts to reach a master that is not there.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
#: A store that makes room is asked again so often, after so long.
_FULL_RETRIES, _FULL_PAUSE_S = 2, 0.1

_LOG_LEVEL = "ERROR"
_FATAL_ONLY = 3

# Mooncake's codes, as far as something follows from them.
_NO_ROOM = -200
_NO_SUCH_OBJECT = -704
_NOT_COMPLETE = -703
_LEASE_EXPIRED = -707
_NO_MASTER = (-900, -57600, -57664)
#: The blob may have another size, or moving it failed.
_MAYBE_SIZE = (-600, -800)


class MooncakeError(Exception):
    """The store failed, in a way that is not about one blob."""


class MooncakeBlobs:
    """A client of the store whose master is at `address`.

    host_pool: memory that pages come from and go to. Raises ConfigError if the library cannot be
    loaded; a master that is not there is no reason not to start.
    """

    def __init__(
        self,
        address: StoreAddress,
        deadline_s: float,
        host_pool: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.name = address.name
        self._address = address
        _set_limits(deadline_s)
        self._library = _load_library()
        self._store = self._library.MooncakeDistributedStore()
        self._config = self._replication()
        self._lock = threading.Lock()
        self._registered: list[npt.NDArray[np.uint8]] = [] if host_pool is None else [host_pool]
        self._is_connected = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(
            target=self.connect, name="tiered-kv-mooncake-setup", daemon=True
        )
        self._thread.start()

    def _replication(self) -> Any:
        config, parameters = self._library.ReplicateConfig(), self._address.parameters
        config.replica_num = parameters.get("replicas", 1)
        if "soft_pin" in parameters:
            # Both, or it has no effect.
            config.soft_pin_action = self._library.SoftPinAction.ENABLE
            config.soft_pin_ttl_ms = int(parameters["soft_pin"] * 1000)
        return config

    # -- the connection -----------------------------------------------------------------------

    def connect(self) -> None:
        """Returns when there is a connection, or the client is closed."""
        pause_s = _FIRST_PAUSE_S
        while not self._is_closing.is_set() and not self._is_connected.is_set():
            with self._lock:
                if not self._is_connected.is_set() and self._set_up() == 0:
                    _keep_quiet(self._library.__file__)
                    for memory in self._registered:
                        self._register(memory)
                    self._is_connected.set()
                    return
            self._is_closing.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _set_up(self) -> int:
        address, parameters = self._address, self._address.parameters
        code: int = self._store.setup(
            parameters.get("hostname") or _own_address(address.host, address.port),
            parameters.get("metadata", "P2PHANDSHAKE"),
            parameters.get("segment", 0),
            _LOCAL_BUFFER_BYTES,
            parameters.get("protocol", "tcp"),
            parameters.get("device", ""),
            f"{address.host}:{address.port}",
        )
        return code

    def _register(self, memory: npt.NDArray[np.uint8]) -> None:
        code = self._store.register_buffer(memory.ctypes.data, memory.nbytes)
        if code:
            logger.warning(
                "Store %s could not register %d bytes of memory (code %d).",
                self.name,
                memory.nbytes,
                code,
            )

    def _connected(self) -> Any:
        if not self._is_connected.is_set():
            raise MooncakeError("there is no connection to its master yet")
        return self._store

    def close(self) -> None:
        self._is_closing.set()
        if self._is_connected.is_set():
            self._is_connected.clear()
            self._store.close()

    # -- blobs --------------------------------------------------------------------------------

    def memory(self, n_bytes: int) -> memoryview:
        memory: npt.NDArray[np.uint8] = np.zeros(n_bytes, dtype=np.uint8)
        with self._lock:
            self._registered.append(memory)
            if self._is_connected.is_set():
                self._register(memory)
        return memory.data

    def exist(self, keys: Sequence[str]) -> list[bool]:
        codes = self._connected().batch_is_exist([_PREFIX + key for key in keys])
        _raise_if([code for code in codes if code < 0])
        return [code == 1 for code in codes]

    touch = exist
    """Asking leases what is there, which is a use."""

    def read(self, keys: Sequence[str], blobs: Sequence[Pieces]) -> list[int]:
        store, (pointers, sizes) = self._connected(), _pointers(blobs)
        names = [_PREFIX + key for key in keys]
        codes = store.batch_get_into_multi_buffers(names, pointers, sizes)
        expected = [sum(size) for size in sizes]
        found = [
            self._size(name, code, n_bytes)
            for name, code, n_bytes in zip(names, codes, expected, strict=True)
        ]
        failed = [code for code, n_bytes in zip(codes, found, strict=True) if n_bytes is None]
        if len(failed) == len(codes) or any(code in _NO_MASTER for code in failed):
            _raise_if(failed)
        return [-1 if n_bytes is None else n_bytes for n_bytes in found]

    def _size(self, name: str, code: int, expected: int) -> int | None:
        """How many bytes a blob has of which that came; -1 for no blob, None for a failure."""
        if code >= 0:
            return code
        if code == _LEASE_EXPIRED:  # After all of it came, and whoever asked looks at it.
            return expected
        if code in (_NO_SUCH_OBJECT, _NOT_COMPLETE):
            return -1
        if code in _MAYBE_SIZE:
            n_bytes: int = self._store.get_size(name)
            return n_bytes if n_bytes >= 0 and n_bytes != expected else None
        return None

    def write(
        self, keys: Sequence[str], blobs: Sequence[Pieces], replaced: Sequence[bool]
    ) -> list[bool]:
        store = self._connected()
        names = [_PREFIX + key for key in keys]
        old = [name for name, is_old in zip(names, replaced, strict=True) if is_old]
        if old:  # What is there stays, and a write of that name has no effect.
            store.batch_remove(old, True)
        pointers, sizes = _pointers(blobs)
        codes: list[int] = [_NO_ROOM] * len(names)
        for attempt in range(1 + _FULL_RETRIES):
            refused = [n for n, code in enumerate(codes) if code == _NO_ROOM]
            if not refused:
                break
            if attempt:
                time.sleep(_FULL_PAUSE_S)
            answers = store.batch_put_from_multi_buffers(
                [names[n] for n in refused],
                [pointers[n] for n in refused],
                [sizes[n] for n in refused],
                self._config,
            )
            for n, code in zip(refused, answers, strict=True):
                codes[n] = code
        if all(code == _NO_ROOM for code in codes):
            raise StoreFullError("it is full")
        failed = [code for code in codes if code not in (0, _NO_ROOM)]
        if len(failed) == len(codes) or any(code in _NO_MASTER for code in failed):
            _raise_if(failed)
        return [code == 0 for code in codes]

    def remove(self, keys: Sequence[str]) -> int:
        codes = self._connected().batch_remove([_PREFIX + key for key in keys], True)
        _raise_if([code for code in codes if code in _NO_MASTER])
        return sum(code == 0 for code in codes)


def _pointers(blobs: Sequence[Pieces]) -> tuple[list[list[int]], list[list[int]]]:
    pointers = [
        [int(np.frombuffer(piece, dtype=np.uint8).ctypes.data) for piece in pieces]
        for pieces in blobs
    ]
    return pointers, [[len(piece) for piece in pieces] for pieces in blobs]


def _raise_if(failed: Sequence[int]) -> None:
    if failed:
        what = "its master does not answer" if failed[0] in _NO_MASTER else "it failed"
        raise MooncakeError(f"{what}, code {failed[0]}")


def _set_limits(deadline_s: float) -> None:
    """Before the library is loaded: what it reads from the environment only."""
    milliseconds, seconds = str(int(deadline_s * 1000)), str(max(1, round(deadline_s)))
    for name, value in {
        "MC_RPC_TIMEOUT_MS": milliseconds,
        "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
        "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
        "MC_TRANSFER_TIMEOUT": "5",
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        "MC_LOG_LEVEL": _LOG_LEVEL,
    }.items():
        os.environ.setdefault(name, value)


def _keep_quiet(library: str) -> None:
    """It writes lines for every blob that fails; ours says once what is the matter.

    It sets this flag of its logging library when it is set up, to no more than "errors".
    """
    if os.environ.get("MC_LOG_LEVEL") == _LOG_LEVEL:  # nobody asked for more
        with contextlib.suppress(OSError, ValueError):
            flag = ctypes.c_int.in_dll(ctypes.CDLL(library), "_ZN3fLI17FLAGS_minloglevelE")
            flag.value = _FATAL_ONLY


def _load_library() -> Any:
    try:
        import mooncake.store
    except ImportError as error:
        raise ConfigError(
            f"--tiered-kv-store mooncake:// needs Mooncake's client, which cannot be loaded "
            f"({error}): `pip install 'sglang-tiered-kv[mooncake]'`, and of the system "
            "`apt-get install libibverbs1 libnl-3-200 libnl-route-3-200`."
        ) from error
    return mooncake.store


def _own_address(host: str, port: int) -> str:
    """The address of this machine from which the master is reached; nothing is sent."""
    try:
        family, kind, protocol, _, to = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(to)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
