"""Streamed answers of `/generate`, piece by piece, with the time at which each came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import requests

TIMEOUT_S = 900.0
_PIECE = b"data: {"


def pieces(
    url: str, body: dict[str, Any], session: requests.Session | None = None
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(time.perf_counter, answer so far), until the server has said all.

    Raises requests.RequestException, and RuntimeError for an error in the stream or no answer.
    """
    post = requests.post if session is None else session.post
    is_empty = True
    with post(f"{url}/generate", json=body, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines(chunk_size=None):
            if not line.startswith(_PIECE):
                continue
            now_s = time.perf_counter()
            answer = json.loads(line[len(_PIECE) - 1 :])
            if "error" in answer:
                raise RuntimeError(f"the server answered with an error: {answer['error']}")
            is_empty = False
            yield now_s, answer
    if is_empty:
        raise RuntimeError("the server closed the stream without an answer")
