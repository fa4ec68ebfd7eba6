"""What is simulated: an instance of the server, its tiers and the policies in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiered_kv.core.config import STORE_WRITES
from tiered_kv.core.device_spec import DeviceSpec
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import ModelSpec
from tiered_kv.scheduler.cost_model import Correction, CostModel, EdgeCost
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.measured_costs import MeasuredCosts, PassTimes
from tiered_kv.scheduler.policies.slack_config import SlackConfig

GB = 10**9

STOP_POLICIES = ("best_effort", "timeout", "wait_complete", "patience")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """Local storage, as several large reads and writes in flight reach it."""

    read_bandwidth: float = 6.0e9
    """Bytes/s: a data-centre NVMe drive (PCIe 4.0 x4) by its data sheets, slightly derated."""

    write_bandwidth: float = 3.0e9
    """Bytes/s, likewise."""

    latency_s: float = 2e-4
    """Seconds per transfer before the first byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStoreSpec:
    """A store that all servers of a fleet share, and each server's own link to it."""

    capacity_bytes: int
    """Of the store as a whole."""

    bandwidth: float = 11.0e9
    """Bytes/s each way: a 100 Gb/s network card, slightly derated."""

    latency_s: float = 1e-3
    """Seconds per transfer before the first byte."""

    writes: str = "value"
    """What is written there: by value (`memory.store_value`), or all."""

    def __post_init__(self) -> None:
        if self.writes not in STORE_WRITES:
            raise ConfigError(
                f"A shared store takes one of {', '.join(STORE_WRITES)}, not {self.writes!r}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Sizes and rules of the tiers. Sizes are bytes of KV; None for `device_bytes` derives it."""

    device_bytes: int | None = None
    """KV pool on the device; None: `memory_fraction` of its memory less the weights."""

    memory_fraction: float = 0.88
    """As upstream's --mem-fraction-static."""

    host_bytes: int = 0
    """0: no host tier."""

    disk_bytes: int = 0
    """0: no disk tier; it needs a host tier."""

    disk: DiskSpec = DiskSpec()
    """Speed of the disk tier."""

    shared: SharedStoreSpec | None = None
    """The store of the cluster; it needs a host tier."""

    eviction: str = "lru"
    """Name of an eviction policy, or of a simulated one: belady, kvflow, tlru."""

    protect_expected: bool = True
    """Whether what is forecast to be needed soon is passed over."""

    hints: bool = False
    """Whether clients say with a request when their session's next call will come
    (`Request.next_use_hint_s`), which the server forecasts."""

    learn_pauses: bool = False
    """Whether the pauses that clients do not tell of are learned, and forecast."""

    whole_leaves: bool = False
    """Whether a leaf is evicted as a whole, as plain SGLang does; the server's own manager
    keeps the head of the last one."""

    stop_policy: str = "wait_complete"
    """When a request stops waiting for its pages from disk: HiCache's three, and the server's own
    (`MemoryManager.patience_s`, which is endless unless `load_policy` is cost)."""

    load_policy: str = "always"
    """Whether pages in a farther tier are loaded: always, as HiCache does, or cost: as many as pay
    according to the cost model; or never."""

    look_again: bool = True
    """Whether disk and store are asked again, before its turn, for whoever has lost what was cached
    of it while it waited; else on arrival only."""

    prefetch_threshold_tokens: int = 256
    """With HiCache's stop policies, shorter hits on disk are not fetched."""

    timeout_base_s: float = 2.0
    """For the stop policy timeout: a fixed part,"""

    timeout_per_1024_tokens_s: float = 0.1
    """a part that grows with what is fetched,"""

    timeout_max_s: float = 30.0
    """and at most this; HiCache's defaults."""

    def __post_init__(self) -> None:
        if self.stop_policy not in STOP_POLICIES:
            raise ConfigError(
                f"There is no stop policy {self.stop_policy!r}; the known ones are "
                f"{', '.join(STOP_POLICIES)}."
            )
        if self.disk_bytes and not self.host_bytes:
            raise ConfigError("The disk tier is reached through the host tier; give it a size.")
        if self.shared is not None and not self.host_bytes:
            raise ConfigError("A shared store is reached through the host tier; give it a size.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """What policies take the machine for at first: believed seconds over true ones."""

    prefill: float = 1.0
    """Of a pass that prefills; below 1, the machine is slower than believed."""

    decode: float = 1.0
    """Of a pass that decodes."""

    links: float = 1.0
    """Of a transfer between tiers."""

    learns: bool = False
    """Whether they learn from each pass and transfer, as on a server; else they stay with it."""

    def __post_init__(self) -> None:
        if not min(self.prefill, self.decode, self.links) > 0:
            raise ConfigError("A belief is a factor over 0: 0.7 takes what needs 1 s for 0.7 s.")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSettings:
    """One server. Defaults are upstream's for a device of 60 to 160 GB."""

    model: ModelSpec
    device: DeviceSpec
    pass_times: PassTimes | None = None
    """Measured forward passes, which take the place of the device's roofline."""
    cache: CacheSettings = CacheSettings()
    policy: str = "fcfs"
    """Name of a request policy."""

    slack: SlackConfig = field(default_factory=SlackConfig)
    """Of the request policy slack."""

    sessions_named: bool = True
    """Whether clients name their sessions; if not, they are inferred from prompts."""

    iteration_policy: str = "all"
    """Name of an iteration policy: who decodes. all: everyone in every iteration, as SGLang."""

    iteration: IterationConfig = field(default_factory=IterationConfig)
    """Of the iteration policy slack."""

    swap: bool = False
    """Whether requests that make way for others, or for which memory has run out, keep their KV as
    cache; and whether the iteration policy may have them make way. SGLang drops what they
    generated, and only when memory has run out."""

    chunk_tokens: int = 8192
    """--chunked-prefill-size."""

    max_prefill_tokens: int = 16384
    """--max-prefill-tokens."""

    max_running: int = 256
    """--max-running-requests."""

    page_tokens: int = 64
    """--page-size: only its roundings; blocks of the workload are what is cached."""

    mixed_chunk: bool = False
    """--enable-mixed-chunk: prefill chunks and decodes share an iteration."""

    cascade: bool = False
    """Whether decoding reads a prefix that several requests share once (cascade attention); SGLang
    reads it once per request."""

    max_new_tokens: int | None = 2048
    """What clients set as limit where it is not below the true output; None: exactly the output."""

    clip_max_new_tokens: int = 4096
    """Upstream's SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION."""

    init_new_token_ratio: float = 0.7
    """Share of the limit that admission reserves for running requests, at first; upstream's."""

    min_new_token_ratio_factor: float = 0.14
    """It decays to this share of the first value,"""

    new_token_ratio_decay_steps: int = 600
    """in so many decode steps without retraction."""

    noise: float = 0.0
    """Standard deviation of the logarithm of a forward pass's duration."""

    belief: Belief = field(default_factory=Belief)
    """What policies and placement think of all that."""

    def device_tokens(self) -> int:
        """KV tokens that the device holds. Raises ConfigError if the weights leave no room."""
        n_bytes = self.cache.device_bytes
        if n_bytes is None:
            static = self.device.memory_bytes * self.cache.memory_fraction
            n_bytes = int(static - self.model.weight_bytes)
        tokens = int(n_bytes // self.model.kv_bytes_per_token)
        if tokens <= 0:
            raise ConfigError(
                f"{self.model.name} leaves no room for KV on {self.device.name}; take a larger "
                "device or a tensor-parallel group such as 4xH200-141."
            )
        return tokens

    def believed(self) -> CostModel:
        """`costs`, as policies believe them at first."""
        costs, belief = self.costs(), self.belief
        prefill, decode = costs.prefill_correction, costs.decode_correction
        costs.correct(
            prefill=Correction(prefill.fixed_s * belief.prefill, prefill.scale * belief.prefill),
            decode=Correction(decode.fixed_s * belief.decode, decode.scale * belief.decode),
        )
        for source, target in costs.edges:
            cost = costs.edge(source, target)
            costs.correct_edge(
                source,
                target,
                bandwidth=cost.bandwidth / belief.links,
                latency_s=cost.latency_s * belief.links,
            )
        return costs

    def costs(self) -> CostModel:
        """The cost model of this model, device and disk: what is true."""
        link = EdgeCost(self.device.host_link_bandwidth, self.device.host_link_latency_s)
        disk, shared = self.cache.disk, self.cache.shared
        edges = {
            (Tier.HOST, Tier.DEVICE): link,
            (Tier.DEVICE, Tier.HOST): link,
            (Tier.DISK, Tier.HOST): EdgeCost(disk.read_bandwidth, disk.latency_s),
            (Tier.HOST, Tier.DISK): EdgeCost(disk.write_bandwidth, disk.latency_s),
        }
        if shared is not None:
            network = EdgeCost(shared.bandwidth, shared.latency_s)
            edges |= {(Tier.STORE, Tier.HOST): network, (Tier.HOST, Tier.STORE): network}
        if self.pass_times is not None:
            return MeasuredCosts(self.model, self.device, edges, self.pass_times)
        return CostModel(self.model, self.device, edges)
