"""Several servers of one machine, of which one works at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from harness.server import Server


@contextmanager
def servers_up(
    servers: Mapping[str, Server],
    ready: Callable[[Server], object] | None = None,
    *,
    at_once: bool = False,
) -> Iterator[dict[str, Server]]:
    """`servers`, which have names, started one after the other; all stop at the end.

    ready: is called with each when it answers, before the next one starts. Each takes its memory
    meanwhile; `--sleep-on-idle` belongs in their flags. at_once: all start together, on a machine
    that has the cores and the memory for it.
    """
    with ExitStack() as stack:
        up = {}
        for server in servers.values() if at_once else ():
            stack.push(server)
            server.launch()
        for name, server in tqdm(servers.items(), desc="starting", unit="server", leave=False):
            if at_once:
                server.wait_until_up()
            else:
                stack.enter_context(server)
            up[name] = server
            if ready is not None:
                ready(server)
        yield up
