"""A server that prefills and one that decodes, and a client in the place of their router."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from harness.client import Answer, in_parallel, post_generate, request_body
from harness.server import Server, free_port
from harness.stores import mooncake_environment

#: KV goes from one to the other over TCP. What a prefill server sends ahead of a pass needs CUDA.
TCP = ("--disaggregation-transfer-backend", "mooncake_tcp")
LOOPBACK = {"SGLANG_HOST_IP": "127.0.0.1"}

_rooms = itertools.count(1)


class Pair:
    """make: as the fixture `make_server`; both get `args`. Raises StoreMissingError."""

    def __init__(
        self, make: Callable[..., Server], name: str, *args: object, **fields: Any
    ) -> None:
        self._make, self._name, self._args, self._fields = make, name, args, fields
        self._env = {**mooncake_environment(), **LOOPBACK}
        self.bootstrap_port = free_port()

    def prefill(self, *args: object, **env: str) -> Server:
        """A server that is not started yet."""
        mode = ["--disaggregation-mode", "prefill", *TCP]
        mode += ["--disaggregation-bootstrap-port", self.bootstrap_port]
        return self._server("prefill", *mode, *args, **env)

    def decode(self, *args: object, **env: str) -> Server:
        """The same."""
        return self._server("decode", "--disaggregation-mode", "decode", *TCP, *args, **env)

    def _server(self, role: str, *args: object, **env: str) -> Server:
        fields = {**self._fields, "env": {**self._env, **env}}
        return self._make(f"{self._name}-{role}", *self._args, *args, **fields)

    def body(self, prompt: Sequence[int], max_new_tokens: int, **extra: Any) -> dict[str, Any]:
        """Of a request that both servers get."""
        place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port}
        place["bootstrap_room"] = next(_rooms)
        return request_body(prompt, max_new_tokens, **place, **extra)

    def post(
        self, prefill: Server, decode: Server, body: dict[str, Any]
    ) -> tuple[requests.Response, requests.Response]:
        """What each answers."""
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda server: post_generate(server, body), (prefill, decode))
        return first, second

    def ask(
        self,
        prefill: Server,
        decode: Server,
        prompts: Iterable[Sequence[int]],
        max_new_tokens: int = 8,
        concurrency: int = 1,
        **extra: Any,
    ) -> list[Answer]:
        """What the decode server answers; where cached tokens come from is the prefill server's."""

        def ask_one(prompt: Sequence[int]) -> Answer:
            body = self.body(prompt, max_new_tokens, **extra)
            first, second = self.post(prefill, decode, body)
            assert first.status_code == second.status_code == 200, (
                f"{first.text} {second.text}{prefill.tail()}{decode.tail()}"
            )
            return Answer.of(second.json())

        return in_parallel(ask_one, prompts, concurrency)


def both_up(*servers: Server) -> None:
    """A start leaves a core idle most of the time: all at once."""
    with ThreadPoolExecutor(len(servers)) as pool:
        for starting in [pool.submit(server.start) for server in servers]:
            starting.result()
