"""A process that a test or a benchmark starts beside the server, and ends without asking."""

from __future__ import annotations

import subprocess
from types import TracebackType


class ChildProcess:
    """Ended by SIGKILL with its `with`: it keeps nothing that anybody wants."""

    process: subprocess.Popen[bytes] | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill_9()

    def kill_9(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
