"""Shows a running server in a browser: `python -m tiered_kv.view --url http://127.0.0.1:30000`."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from tiered_kv.administration import key_of
from tiered_kv.core.errors import ConfigError, TieredKVError
from tiered_kv.view.hub import Hub
from tiered_kv.view.page import make_page
from tiered_kv.view.recording import Recorder
from tiered_kv.view.source import Replay, Server, Source
from tiered_kv.view.table import table

EXIT_ERROR = 2
KEY_VARIABLE = "TIERED_KV_VIEW_KEY"
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")

DESCRIPTION = """\
Show what a server with --tiered-kv is doing: which prefixes are cached and in which
tier, what moves between the tiers, who waits with how much slack, who runs and who
is parked. Open the address that is printed; the page needs nothing from elsewhere.

Looking keeps the server's scheduler for less than a millisecond at a time, however
many look. The page names prefixes by hashes and shows no text.
"""
EXAMPLES = """\
examples:
  python -m tiered_kv.view                                 the server on port 30000
  python -m tiered_kv.view --url http://10.0.0.5:30000 --key-file admin.key
                                                           one that has an --admin-api-key
  ssh -L 30000:127.0.0.1:30000 gpu-host                    one that listens on its own machine
                                                           only: then as in the first line
  python -m tiered_kv.view --record monday.jsonl.gz        and keep what is seen
  python -m tiered_kv.view --replay monday.jsonl.gz --speed 10
                                                           watch that, without a server
  python -m tiered_kv.view --once                          a table, and the end
  python -m tiered_kv.view --once --json | jq .requests    for programs

A server says what it shows to whom: --tiered-kv-view in its --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; returns the exit status (0 fine, 2 could not run)."""
    options = parser().parse_args(arguments)
    try:
        if options.json and not options.once:
            raise ConfigError("--json goes with --once; add --once.")
        source = _source(options)
        if options.once:
            return _once(source, as_json=options.json)
        return _serve(options, source)
    except TieredKVError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.view",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    add(
        "--key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the server's --admin-api-key; or put the key into {KEY_VARIABLE}",
    )
    add("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    add("--host", default="127.0.0.1", help="where the page listens (default: this machine only)")
    add("--port", type=int, default=30080, help="the page's port (default: %(default)s)")
    add("--record", type=Path, metavar="FILE", help="write what is seen to this file, too")
    add("--replay", type=Path, metavar="FILE", help="show a recording instead of a server")
    add("--speed", type=float, default=1.0, metavar="X", help="of a replay: times as fast (1)")
    add("--once", action="store_true", help="print one snapshot as a table, serve no page")
    add("--json", action="store_true", help="with --once: as JSON")
    return parser


def _source(options: argparse.Namespace) -> Source:
    if not 0.25 <= options.every <= 3600:
        raise ConfigError(f"--every must be from 0.25 to 3600 seconds, not {options.every:g}.")
    if not 0.01 <= options.speed <= 1000:
        raise ConfigError(f"--speed must be from 0.01 to 1000, not {options.speed:g}.")
    if options.replay is None:
        key = key_of("--key-file", options.key_file, KEY_VARIABLE)
        return Server(options.url, key, every_s=options.every)
    if options.record is not None:
        raise ConfigError("--record and --replay exclude each other; drop one of them.")
    return Replay(options.replay, speed=options.speed)


def _once(source: Source, *, as_json: bool) -> int:
    if not isinstance(source, Server):
        raise ConfigError("--once asks a server; leave --replay out.")
    snapshot = asyncio.run(source.once())
    sys.stdout.write(json.dumps(snapshot, indent=1) + "\n" if as_json else table(snapshot))
    return 0


def _serve(options: argparse.Namespace, source: Source) -> int:
    recorder = None if options.record is None else Recorder(options.record)
    is_local = _is_loopback(options.host)
    name = options.host if ":" not in options.host else f"[{options.host}]"
    hub = Hub(source, recorder)
    config = uvicorn.Config(
        make_page(hub, LOCAL_NAMES if is_local else ("*",)),
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )
    about = f"Showing {source.about['name']} at http://{name}:{options.port}/"
    server = _PageServer(config, hub, about)
    if not is_local:
        sys.stderr.write("Whoever reaches this machine may see the page: it asks for no key.\n")
    try:
        server.run()
    except SystemExit:
        raise ConfigError(
            f"The page cannot listen on {name}:{options.port}; see above, and give another --port "
            "or --host."
        ) from None
    return 0


class _PageServer(uvicorn.Server):
    """Says where the page is as soon as it is there, and ends event streams when it goes."""

    def __init__(self, config: uvicorn.Config, hub: Hub, sentence: str) -> None:
        super().__init__(config)
        self._hub = hub
        self._sentence = sentence

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(f"{self._sentence}\n")
            sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Browsers keep them open for ever.
        self._hub.end_views()
        await super().shutdown(sockets)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
