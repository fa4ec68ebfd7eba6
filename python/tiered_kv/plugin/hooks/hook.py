"""What one hook is, and in which process it belongs."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Process(enum.Enum):
    """The kinds of process a server consists of; the value is the module that makes it one."""

    SCHEDULER = "sglang.srt.managers.scheduler"
    TOKENIZER = "sglang.srt.managers.tokenizer_manager"
    DETOKENIZER = "sglang.srt.managers.detokenizer_manager"
    HTTP_SERVER = "sglang.srt.entrypoints.http_server"
    ENGINE = "sglang.srt.entrypoints.engine"


@dataclass(frozen=True, slots=True)
class Hook:
    """One function of ours, attached to one function of SGLang's."""

    target: str
    """Dotted name of the function or method."""
    kind: str
    """before, after, around or replace: SGLang's `HookType`, whose signatures apply."""
    function: str
    """Our function, as "package.module:name", imported when the hook is applied. It must do nothing
    for an object whose `server_args.tiered_kv` is off: two engines may share a process."""
    process: Process
    """Where it is needed; its absence there refuses the start."""
    why: str
    """What would be wrong without it."""
