"""Where snapshots come from: a server, asked again and again, or a recording of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import httpx

from tiered_kv.administration import url_of
from tiered_kv.core.errors import TieredKVError
from tiered_kv.snapshot.schema import VERSION
from tiered_kv.view.recording import read_recording

PATH = "/tiered_kv/snapshot"
#: Longer than the server itself waits for its scheduler.
TIMEOUT_S = 15.0


class NoSnapshotError(TieredKVError):
    """One sentence: why there is no snapshot now."""


class Source(Protocol):
    """What the page shows."""

    @property
    def about(self) -> dict[str, Any]:
        """What it is: `kind` (live, replay) and `name`."""

    def snapshots(self) -> AsyncIterator[dict[str, Any] | NoSnapshotError]:
        """One after the other, each at its time."""


class Server:
    """An SGLang server with --tiered-kv. Raises ConfigError for a URL that is none."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        every_s: float = 1.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """transport: in place of the network, for tests."""
        self.url = url_of(url)
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._every_s = every_s
        self._transport = transport

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "live", "name": self.url, "every_s": self._every_s}

    async def snapshots(self) -> AsyncIterator[dict[str, Any] | NoSnapshotError]:
        async with self._client() as client:
            while True:
                asked_s = time.monotonic()
                try:
                    yield await self._ask(client)
                except NoSnapshotError as error:
                    yield error
                await asyncio.sleep(max(0.0, asked_s + self._every_s - time.monotonic()))

    async def once(self) -> dict[str, Any]:
        """One snapshot. Raises NoSnapshotError."""
        async with self._client() as client:
            return await self._ask(client)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers, timeout=TIMEOUT_S, transport=self._transport
        )

    async def _ask(self, client: httpx.AsyncClient) -> dict[str, Any]:
        try:
            response = await client.get(self.url + PATH)
        except httpx.TimeoutException:
            raise NoSnapshotError(
                f"{self.url} has not answered within {TIMEOUT_S:.0f} s; it is overloaded or hangs."
            ) from None
        except httpx.HTTPError as error:
            raise NoSnapshotError(
                f"No server answers at {self.url} ({type(error).__name__}); start it, or give "
                "another --url."
            ) from None
        if response.status_code != httpx.codes.OK:
            raise NoSnapshotError(_refused(self.url, response))
        try:
            snapshot: dict[str, Any] = response.json()
            version = snapshot["version"]
        except (ValueError, KeyError, TypeError):
            raise NoSnapshotError(
                f"What answers at {self.url} is no SGLang server with --tiered-kv; give another "
                "--url."
            ) from None
        if version != VERSION:
            raise NoSnapshotError(
                f"The server's snapshots have version {version}, and this page knows {VERSION}; "
                "install the same release of sglang-tiered-kv on both sides."
            )
        return snapshot


def _refused(url: str, response: httpx.Response) -> str:
    status = response.status_code
    if status == httpx.codes.UNAUTHORIZED:
        return (
            f"{url} wants its administrator's key; give it by --key-file or in TIERED_KV_VIEW_KEY."
        )
    if status == httpx.codes.NOT_FOUND:
        return f"{url} serves no snapshots; start it with --tiered-kv, of a release that has them."
    try:
        sentence = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        sentence = None
    if isinstance(sentence, str):
        return sentence
    return f"{url} answers with HTTP {status} instead of a snapshot; see its log."


class Replay:
    """A recording, again and again. Raises ConfigError if it cannot be read.

    speed: how many times as fast as it was recorded.
    """

    def __init__(self, path: Path, *, speed: float = 1.0) -> None:
        self._path = path
        self._speed = speed
        self._lines = read_recording(path)

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "replay", "name": self._path.name, "speed": self._speed}

    async def snapshots(self) -> AsyncIterator[dict[str, Any] | NoSnapshotError]:
        while True:
            at_s = self._lines[0].at_s
            for line in self._lines:
                await asyncio.sleep(max(0.0, line.at_s - at_s) / self._speed)
                at_s = line.at_s
                yield NoSnapshotError(line.error) if line.snapshot is None else line.snapshot
            await asyncio.sleep(1.0)
