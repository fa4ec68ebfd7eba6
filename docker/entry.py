"""What runs first in the images: the server is its child, and its exit code says how that ended.

    python3 entry.py COMMAND [ARGUMENT ...]

SGLang ends its processes by SIGKILL, itself last, whether it was asked to stop or refuses its
configuration. The kernel does not let process 1 of a container do that to itself: there the exit
code would be 0 after a refusal too, SIGTERM would be lost while the server starts, and a stop would
wait for the interpreter to take everything apart.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
FAILED = 1


def run(command: Sequence[str]) -> int:
    """Start `command`, hand signals on to it, and return the exit code when it has ended.

    Its own, if it exits; 0 if a signal ended it that was to; else 1 for SIGKILL, which is how
    SGLang fails, and 128 + the signal's number for others, as in a shell.
    """
    watched = {*STOPS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=())
    was_asked = False
    while True:
        number = signal.sigwait(watched)
        if number in STOPS:
            was_asked = True
            os.kill(child, number)  # not reaped yet, so the number is still its own
        elif (status := _reap().get(child)) is not None:
            return _exit_code(os.waitstatus_to_exitcode(status), was_asked=was_asked)


def _reap() -> dict[int, int]:
    """The statuses of all processes that have ended; process 1 inherits those without a parent."""
    ended = {}
    try:
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended[found[0]] = found[1]
    except ChildProcessError:
        pass
    return ended


def _exit_code(code: int, *, was_asked: bool) -> int:
    if code >= 0:
        return code
    if was_asked:
        return 0
    return FAILED if code == -signal.SIGKILL else 128 - code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
