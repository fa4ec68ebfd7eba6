"""What remains of the plugin when it cannot work: a `--tiered-kv` that says why.

Without it the flag would merely be an "unrecognized argument", since SGLang hides the reason. It
relies on nothing of SGLang but `ServerArgs.add_cli_args` and its constructor.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from tiered_kv.core.errors import UpstreamError
from tiered_kv.plugin.start.engine import loaded_engine


def install(reason: str) -> None:
    """Make `--tiered-kv` and `Engine(tiered_kv=...)` fail with `reason`, one sentence."""
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
        _check(kwargs, reason)
        stock_init(self, *args, **kwargs)

    ServerArgs.add_cli_args = staticmethod(add_cli_args)
    runs_init = type(ServerArgs) is type
    if runs_init:
        ServerArgs.__init__ = init
    else:
        _refuse_in_engine(ServerArgs, reason)


def _refuse_in_engine(stock: Any, reason: str) -> None:
    """Of a class that makes its objects without its `__init__`, as msgspec's do.

    Engine makes them, and loads plugins first, so its module is there.
    """

    def make(*args: Any, **kwargs: Any) -> Any:
        _check(kwargs, reason)
        return stock(*args, **kwargs)

    engine_class = loaded_engine()
    if engine_class is not None:
        engine_class.server_args_class = staticmethod(make)


def _check(given: dict[str, Any], reason: str) -> None:
    if any(name.startswith("tiered_kv") for name in given):
        raise UpstreamError(reason)


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
