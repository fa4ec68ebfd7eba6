"""How long a prefill, a forward pass or a load takes: one model that every decision asks.

A roofline (Williams et al., CACM 2009): a forward pass takes the longer of its arithmetic and its
memory traffic, at the share of the peak that kernels reach, plus a fixed part. Calibration
(`calibration.py`) replaces the fixed part and scales the rest by what a server observes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tiered_kv.core.device_spec import DeviceSpec
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import ModelSpec

Edge = tuple[Tier, Tier]
"""(source, target) of a transfer between neighbouring tiers."""


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """What one edge between two tiers costs: `latency_s` per job, then `bandwidth` bytes/s."""

    bandwidth: float
    latency_s: float

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.latency_s >= 0):
            raise ConfigError(
                f"An edge needs a positive bandwidth and a latency of at least 0, not "
                f"{self.bandwidth} B/s and {self.latency_s} s."
            )


class Correction(NamedTuple):
    """Observed seconds = `fixed_s` + `scale` * roofline seconds, for one kind of forward pass."""

    fixed_s: float
    scale: float = 1.0


class Work(NamedTuple):
    """What a part of a forward pass does, summed over all layers."""

    flops: float
    n_bytes: float
    again_s: float = 0.0
    """Seconds of reads beyond those, where kernels read something more than once."""


class CostModel:
    """Predicts seconds for one model on one device (or tensor-parallel group) and its tiers.

    edges: the cost of each edge in use; a load between tiers that are not neighbours goes through
    the host. Deterministic and without side effects, but for `correct` and `correct_edge`.
    """

    def __init__(
        self,
        model: ModelSpec,
        device: DeviceSpec,
        edges: Mapping[Edge, EdgeCost],
        *,
        host_bytes_per_token: float | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.host_bytes_per_token = (
            float(model.kv_bytes_per_token)
            if host_bytes_per_token is None
            else host_bytes_per_token
        )
        """KV bytes of a token between host and device, which differ if the host encodes them."""
        self.prefill_correction = Correction(device.iteration_floor_s)
        self.decode_correction = Correction(device.iteration_floor_s)
        self.mixed_correction: Correction | None = None
        """Of passes of both kinds; None: none was observed, so it follows from the other two."""
        self._edges = dict(edges)
        self._flops = device.flops * device.compute_efficiency
        self._bandwidth = device.memory_bandwidth * device.bandwidth_efficiency
        embedding = model.vocab_size * model.hidden_size
        n_embeddings = 1 if model.tied_embeddings else 2
        body = max(model.n_active_parameters - n_embeddings * embedding, 0)
        self._flops_per_token = 2.0 * body
        self._flops_per_logits = 2.0 * embedding
        n_attending = model.n_attention_layers
        self._flops_per_pair_prefill = 4.0 * n_attending * model.n_heads * model.head_dim
        self._flops_per_pair_decode = self._flops_per_pair_prefill
        if model.mla_kv_lora_rank:
            # Decoding attends in the latent space: scores over latent and rope, values from latent.
            width = 2 * model.mla_kv_lora_rank + model.mla_rope_head_dim
            self._flops_per_pair_decode = 2.0 * n_attending * model.n_heads * width
        self._kv_bytes = float(model.kv_bytes_per_token)
        self._weight_bytes = float(model.weight_bytes)
        # What kernels read beyond the roofline's once, whatever they compute meanwhile.
        weights_s = self._weight_bytes / self._bandwidth
        kv_s = self._kv_bytes / self._bandwidth
        self._packing_s = device.prefill_weight_reads * weights_s
        self._reread_s_per_cached = (device.prefill_kv_reads - 1.0) * kv_s
        self._reread_s_per_request = device.decode_weight_reads * weights_s
        self._reread_s_per_context = (device.decode_kv_reads - 1.0) * kv_s
        # A mixture of experts reads more of them the more tokens there are.
        self._inactive_share = 1.0 - min(1.0, model.n_active_parameters / model.n_parameters)

    # -- forward passes -----------------------------------------------------------------------

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds to compute `new_tokens` of one prompt after `cached_tokens` that are there."""
        if new_tokens <= 0:
            return 0.0
        work = self._prefill_work(new_tokens, cached_tokens)
        seconds = self._roofline(work.flops, work.n_bytes + self._weights_read(new_tokens))
        seconds += self._packing_s + work.again_s
        return self.prefill_correction.fixed_s + self.prefill_correction.scale * seconds

    def marginal_prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds that `new_tokens` more add to a forward pass that takes place anyway."""
        if new_tokens <= 0:
            return 0.0
        work = self._prefill_work(new_tokens, cached_tokens, n_logits=0)
        # Arithmetic binds in any prefill worth a decision: the weights are read in any case.
        return self.prefill_correction.scale * self._work_s(work)

    def iteration_s(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_contexts_tokens: int,
        n_decodes: int,
        shared_tokens_saved: int = 0,
    ) -> float:
        """Seconds of one forward pass over prefill chunks and decoding requests.

        prefills: (new, cached) tokens of each chunk. decode_contexts_tokens: the sum of the
        contexts of the `n_decodes` requests that decode one token each. shared_tokens_saved: how
        many of those tokens need not be read because a gang reads a shared prefix once.
        """
        n_new, prefill = self._chunks_work(prefills)
        if n_new + n_decodes <= 0:
            return 0.0
        decode = self._decode_work(decode_contexts_tokens, n_decodes, shared_tokens_saved)
        correction = self._mixed(self._work_s(prefill), self._work_s(decode))
        seconds = self._pass_s(prefill, decode, n_new + n_decodes)
        return correction.fixed_s + correction.scale * seconds

    def mixing_gain_s(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_contexts_tokens: int,
        n_decodes: int,
        shared_tokens_saved: int = 0,
    ) -> float:
        """Seconds by which one pass of both kinds is shorter than one of each.

        shared_tokens_saved: by a decode of its own; beside a prefill nothing is read once for
        several.
        """
        if not n_decodes:
            return 0.0
        apart_s = self.iteration_s(prefills, 0, 0)
        apart_s += self.iteration_s((), decode_contexts_tokens, n_decodes, shared_tokens_saved)
        return apart_s - self.iteration_s(prefills, decode_contexts_tokens, n_decodes)

    def roofline_s(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_contexts_tokens: int,
        n_decodes: int,
        shared_tokens_saved: int = 0,
    ) -> float:
        """`iteration_s` without fixed part and correction: what calibration compares with."""
        n_new, prefill = self._chunks_work(prefills)
        if n_new + n_decodes <= 0:
            return 0.0
        decode = self._decode_work(decode_contexts_tokens, n_decodes, shared_tokens_saved)
        return self._pass_s(prefill, decode, n_new + n_decodes)

    # -- transfers ----------------------------------------------------------------------------

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        """Seconds until `n_bytes` from `source` are in `target`, behind `queued_bytes`.

        A pipeline through every edge on the way: their latencies add up, the narrowest edge sets
        the pace. Raises ConfigError if no edge leads there.
        """
        if n_bytes <= 0 or source is target:
            return 0.0
        latency_s, bandwidth = 0.0, float("inf")
        for edge in self.path(source, target):
            cost = self._edges[edge]
            latency_s += cost.latency_s
            bandwidth = min(bandwidth, cost.bandwidth)
        return latency_s + (n_bytes + queued_bytes) / bandwidth

    def edge(self, source: Tier, target: Tier) -> EdgeCost:
        """The cost of one edge, as it is believed now. Raises ConfigError for an unknown one."""
        try:
            return self._edges[source, target]
        except KeyError:
            raise ConfigError(
                f"There is no edge from {source.name} to {target.name} in the cost model; name its "
                "bandwidth and latency."
            ) from None

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Those that it knows the cost of."""
        return tuple(self._edges)

    def path(self, source: Tier, target: Tier) -> tuple[Edge, ...]:
        """The edges from `source` to `target`: a direct one, else through the host."""
        if (source, target) in self._edges:
            return ((source, target),)
        for edge in ((source, Tier.HOST), (Tier.HOST, target)):
            self.edge(*edge)
        return ((source, Tier.HOST), (Tier.HOST, target))

    # -- calibration --------------------------------------------------------------------------

    def correct(
        self,
        *,
        prefill: Correction | None = None,
        decode: Correction | None = None,
        mixed: Correction | None = None,
    ) -> None:
        """Believe these corrections of the roofline from now on."""
        self.prefill_correction = prefill or self.prefill_correction
        self.decode_correction = decode or self.decode_correction
        self.mixed_correction = mixed or self.mixed_correction

    def forget_mixing(self) -> None:
        """Believe of passes of both kinds what follows from those of one."""
        self.mixed_correction = None

    def correct_edge(
        self,
        source: Tier,
        target: Tier,
        *,
        bandwidth: float | None = None,
        latency_s: float | None = None,
    ) -> None:
        """Believe this cost of an edge from now on. Raises ConfigError for an unknown edge."""
        cost = self.edge(source, target)
        if bandwidth is not None:
            cost = replace(cost, bandwidth=bandwidth)
        if latency_s is not None:
            cost = replace(cost, latency_s=latency_s)
        self._edges[source, target] = cost

    # -- internals ----------------------------------------------------------------------------

    def _prefill_work(self, new: int, cached: int, n_logits: int = 1) -> Work:
        pairs = new * (cached + (new + 1) / 2.0)
        flops = (
            new * self._flops_per_token
            + n_logits * self._flops_per_logits
            + pairs * self._flops_per_pair_prefill
        )
        n_bytes = (cached + 2 * new) * self._kv_bytes
        return Work(flops, n_bytes, cached * self._reread_s_per_cached)

    def _chunks_work(self, prefills: Sequence[tuple[int, int]]) -> tuple[int, Work]:
        """(new tokens, work) of all chunks."""
        if len(prefills) == 1:  # Policies ask hundreds of times for each plan.
            ((new, cached),) = prefills
            return new, self._prefill_work(new, cached)
        n_new, flops, n_bytes, again_s = 0, 0.0, 0.0, 0.0
        for new, cached in prefills:
            work = self._prefill_work(new, cached)
            n_new += new
            flops += work.flops
            n_bytes += work.n_bytes
            again_s += work.again_s
        return n_new, Work(flops, n_bytes, again_s)

    def _decode_work(self, context_tokens: int, n_decodes: int, saved_tokens: int) -> Work:
        flops = n_decodes * (self._flops_per_token + self._flops_per_logits)
        flops += context_tokens * self._flops_per_pair_decode
        read = max(0, context_tokens - saved_tokens)
        again_s = n_decodes * self._reread_s_per_request + read * self._reread_s_per_context
        return Work(flops, (read + n_decodes) * self._kv_bytes, again_s)

    def _pass_s(self, prefill: Work, decode: Work, n_tokens: int) -> float:
        n_bytes = prefill.n_bytes + decode.n_bytes + self._weights_read(n_tokens)
        seconds = self._roofline(prefill.flops + decode.flops, n_bytes)
        seconds += prefill.again_s + decode.again_s
        return seconds + self._packing_s if prefill.flops else seconds

    def _weights_read(self, n_tokens: int) -> float:
        if not self._inactive_share:
            return self._weight_bytes
        return float(self._weight_bytes * (1.0 - self._inactive_share**n_tokens))

    def _work_s(self, work: Work) -> float:
        return self._roofline(work.flops, work.n_bytes) + work.again_s

    def _roofline(self, flops: float, n_bytes: float) -> float:
        return max(flops / self._flops, n_bytes / self._bandwidth)

    def _mixed(self, prefill_s: float, decode_s: float) -> Correction:
        """The corrections of both kinds, weighted by the time that each kind takes alone."""
        if not prefill_s:
            return self.decode_correction
        if not decode_s:
            return self.prefill_correction
        if self.mixed_correction is not None:
            return self.mixed_correction
        share = prefill_s / (prefill_s + decode_s)
        return Correction(
            max(self.prefill_correction.fixed_s, self.decode_correction.fixed_s),
            share * self.prefill_correction.scale + (1.0 - share) * self.decode_correction.scale,
        )


class PlacementCosts:
    """A cost model as placement sees it (`memory.costs.Costs`).

    tokens_per_unit: how many tokens one token of the forest stands for; a simulation may run the
    forest over blocks. bytes_per_token: of such a unit, where it is not what the model says, as on
    one rank of several. tier_bytes_per_token: the same for tiers that keep them in another format.
    """

    def __init__(
        self,
        model: CostModel,
        tokens_per_unit: int = 1,
        *,
        bytes_per_token: float | None = None,
        tier_bytes_per_token: Mapping[Tier, float] | None = None,
    ) -> None:
        self._model = model
        self._tokens_per_unit = tokens_per_unit
        unit_bytes = (
            model.model.kv_bytes_per_token * tokens_per_unit
            if bytes_per_token is None
            else bytes_per_token
        )
        self._bytes_per_token = dict.fromkeys(Tier, float(unit_bytes))
        self._bytes_per_token.update(tier_bytes_per_token or {})

    def bytes_per_token(self, tier: Tier) -> float:
        return self._bytes_per_token[tier]

    def recompute_s(self, start: int, end: int) -> float:
        unit = self._tokens_per_unit
        return self._model.marginal_prefill_s((end - start) * unit, start * unit)

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        return self._model.load_s(source, target, n_bytes, queued_bytes)
