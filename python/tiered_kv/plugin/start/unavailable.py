"""What remains of the plugin when it cannot work: a `--tiered-kv` that says why.

Without it the flag would merely be an "unrecognized argument", since SGLang hides the reason. It
relies on nothing of SGLang but `ServerArgs.add_cli_args` and its constructor.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from tiered_kv.core.errors import UpstreamError


def install(reason: str) -> None:
    """Make `--tiered-kv` and `ServerArgs(tiered_kv=...)` fail with `reason`, one sentence."""
    from sglang.srt.server_args import ServerArgs

    add_stock_cli_args = ServerArgs.add_cli_args
    stock_init = ServerArgs.__init__

    @functools.wraps(add_stock_cli_args)
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        add_stock_cli_args(parser)
        parser.add_argument(
            "--tiered-kv",
            action=_Refuse,
            nargs=0,
            default=argparse.SUPPRESS,
            const=reason,
            help=f"Not available: {reason}".replace("%", "%%"),
        )

    @functools.wraps(stock_init)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        if any(name.startswith("tiered_kv") for name in kwargs):
            raise UpstreamError(reason)
        stock_init(self, *args, **kwargs)

    ServerArgs.add_cli_args = staticmethod(add_cli_args)
    ServerArgs.__init__ = init


class _Refuse(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        # Not parser.error(): it would print SGLang's four hundred flags before the sentence.
        parser.exit(2, f"{parser.prog}: error: {self.const}\n")
