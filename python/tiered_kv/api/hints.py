"""What a caller knows of its request that the server cannot see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hints:
    """Nothing is promised to, or by, a caller who hints: the scheduler and the cache weigh it."""

    expected_output_tokens: int | None = None
    """How long the answer will be, in tokens; None: not known."""
    next_call_in_s: float | None = None
    """When the next request that continues this one will come, in seconds after its last token,
    for example because a tool runs meanwhile; None: not known."""
    next_call_probability: float = 1.0
    """How sure it is that there will be one, 0 to 1; 0 says that the KV may go at once."""
    session_id: str | None = None
    """The session (chain of reasoning and tool calls, "program") that the request is a call of."""
    parent_session_id: str | None = None
    """The session that started this one, as an agent starts another."""
    branches: int = 1
    """How many sessions that one starts at the same time, this one included."""
    session_final: bool = False
    """Whether this is the session's last call."""
    tool: str | None = None
    """The tool whose result the request brings, as the caller calls it."""
    priority: int | None = None
    """Larger is more important to the caller; None: not said."""


NO_HINTS = Hints()
