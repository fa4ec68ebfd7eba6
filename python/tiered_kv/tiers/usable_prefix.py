"""What a hierarchy can give to a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.forest.node import Node


@dataclass(frozen=True, slots=True)
class UsablePrefix:
    """What a prompt can reuse: `device` nodes now, then `host` nodes after a load.

    Nodes LOADING on the device count as device nodes: the batch that runs over them waits at the
    gate, layer by layer.
    """

    root: Node
    device: tuple[Node, ...]
    host: tuple[Node, ...]

    @property
    def last_device(self) -> Node:
        return self.device[-1] if self.device else self.root

    @property
    def last(self) -> Node:
        return self.host[-1] if self.host else self.last_device

    @property
    def n_host_tokens(self) -> int:
        return sum(node.n_tokens for node in self.host)
