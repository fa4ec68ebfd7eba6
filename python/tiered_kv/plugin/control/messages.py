"""What the HTTP server and the schedulers say to each other about an order.

SGLang carries a question for its internal state to every rank of every replica, and one answer of
each replica back. The question has one text of its own, `rid`: so a message is a text.
"""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

_PREFIX = "tiered_kv_order "
#: The name of a scheduler's word in the answer.
ANSWER_KEY = "tiered_kv_order"

#: Steps of an order: a part of a prompt comes, it begins, it goes on for a round, it is over.
PROMPT, BEGIN, ROUND, END = "prompt", "begin", "round", "end"
#: Where it stands: it wants another round, waits before one, is done, is not known, cannot be.
MORE, WAITS, DONE, UNKNOWN, REFUSED = "more", "waits", "done", "unknown", "refused"

#: Tokens of one message: reading them is a moment of the scheduler's thread.
TOKENS_MAX = 65_536


def written(fields: Mapping[str, Any], tokens: array[int] | None = None) -> str:
    """The text of a message with these fields (JSON), and tokens."""
    packed = b""
    if tokens is not None:
        packed = base64.b64encode(np.asarray(tokens, dtype="<i4").tobytes())
    return f"{_PREFIX}{json.dumps(fields)}\n{packed.decode('ascii')}"


def read(text: str | None) -> tuple[dict[str, Any], array[int]] | None:
    """The fields and tokens of a message; None for another text."""
    if text is None or not text.startswith(_PREFIX):
        return None
    fields, _, packed = text.removeprefix(_PREFIX).partition("\n")
    ids = np.frombuffer(base64.b64decode(packed), dtype="<i4").astype(np.int64)
    return json.loads(fields), array("q", ids.tobytes())
