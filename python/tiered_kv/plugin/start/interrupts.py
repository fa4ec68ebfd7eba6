"""Ctrl-C reaches all processes of a terminal at once; the launcher is the one to act on it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from typing import Any


def leave_to_launcher(_manager: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Ignore SIGINT in a process that the launcher started and will end.

    BEFORE `Scheduler.__init__` and `DetokenizerManager.__init__`.
    """
    if not getattr(server_args, "tiered_kv", False):
        return
    is_child = multiprocessing.parent_process() is not None
    if is_child and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_without_traceback(
    original: Callable[..., None], server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND `_setup_and_run_http_server`, which raises KeyboardInterrupt on 0.5.23 when all of it
    has ended."""
    try:
        original(server_args, *args, **kwargs)
    except KeyboardInterrupt:
        if not getattr(server_args, "tiered_kv", False):
            raise
