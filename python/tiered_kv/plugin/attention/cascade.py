"""Cascade attention on the server: from the batch that is launched to its attention backend.

The plan is made from the scheduler's batch, which knows the requests, and carried out by the
backend, which sees only SGLang's forward batch. Attributes of that do not survive, so the plan
waits here in between: the backend's `CascadePlanner` makes it after `ForwardBatch.init_new`, and
lets the backend have it only within the `ModelRunner.forward` of that very forward batch. Every
other pass (warming up, capturing graphs) finds none and runs as upstream's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

from tiered_kv.attention.grouping import Context, path_of
from tiered_kv.attention.payoff import (
    AttentionShape,
    CascadeDevice,
    cascade_device,
    net_saving_s,
    plan_batch,
)
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache.costs import nearest_device
from tiered_kv.plugin.options import cascade as cascade_option
from tiered_kv.plugin.upstream.current import arguments, request_kv

if TYPE_CHECKING:
    from tiered_kv.attention.grouping import Stretch

logger = logging.getLogger(__name__)

#: Batches whose plans are remembered: where not everyone decodes in every pass, they take turns.
PLANS_KEPT = 8

#: Seconds that a layer takes longer without a CUDA graph: a cautious estimate, a dozen launches and
#: the Python between them. A plan that no graph can replay must save more.
EAGER_S = 200e-6

#: Passes over shared KV in one batch; each is captured in a CUDA graph of its own, for every size.
LEVELS_MAX = 2


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """What a backend needs to know of a decode batch."""

    plan: CascadePlan

    n_tokens: tuple[int, ...]
    """Tokens of each row's context, the newest included."""

    is_new: bool
    """Whether the plan was made for this batch; else it is an earlier one's, and still right."""


@dataclass(frozen=True, slots=True)
class _KnownPlan:
    """A plan, and for whom: requests and nodes are compared by identity, as they compare."""

    reqs: list[Any]
    nodes: list[Any]
    slots: list[Any]
    plan: CascadePlan


class CascadePlanner:
    """Plans for the decode batches of one rank, one after the other.

    A plan holds as long as the batch has the same requests, at the same nodes of the forest: what
    they share stays in its slots, and what they decode is their own.
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: CascadeDevice,
        *,
        eager_s: float = 0.0,
        max_levels: int = LEVELS_MAX,
    ) -> None:
        """eager_s: seconds that a layer takes longer for a plan that no CUDA graph can replay."""
        self.shape = shape
        self.device = device
        self.has_graph: Callable[[CascadePlan], bool] = _never
        """Whether a plan can be replayed in a CUDA graph; a backend that has graphs says so."""
        self._eager_s = eager_s
        self._max_levels = max_levels
        # Newest first.
        self._plans: list[_KnownPlan] = []
        self._launched: tuple[object, PlannedBatch] | None = None
        self._current: PlannedBatch | None = None

    def launch(self, forward_batch: object, batch: Any) -> None:
        """`batch` is about to run as `forward_batch`."""
        planned = self.plan(batch)
        self._launched = None if planned is None else (forward_batch, planned)
        if planned is not None:
            n_tokens, cache = sum(planned.n_tokens), batch.tree_cache
            cache.saved_tokens = planned.plan.saved_tokens
            cache.parts.metrics.decoded(n_tokens, n_tokens - cache.saved_tokens)

    def begin(self, forward_batch: object) -> None:
        """The next pass of the model is `forward_batch`'s."""
        launched, self._launched = self._launched, None
        is_known = launched is not None and launched[0] is forward_batch
        self._current = launched[1] if launched is not None and is_known else None

    @property
    def current(self) -> PlannedBatch | None:
        """The batch of the pass that has begun, if it has a plan."""
        return self._current

    def take(self) -> PlannedBatch | None:
        """The same, once."""
        current, self._current = self._current, None
        return current

    def plan(self, batch: Any) -> PlannedBatch | None:
        """None for anything but a plain decode batch, which upstream then attends for."""
        if (
            not batch.forward_mode.is_decode()
            or batch.spec_info is not None
            or batch.encoder_lens is not None
            or batch.seq_lens_cpu is None
            or not batch.reqs
        ):
            return None
        n_tokens = tuple(batch.seq_lens_cpu.tolist())
        reqs = batch.reqs
        nodes = [req.last_node for req in reqs]
        # A request that made way may find its node in other slots when it comes back: they are in
        # another tensor then.
        slots = list(map(request_kv.prefix_identity, reqs))
        for i, known in enumerate(self._plans):
            if known.reqs == reqs and known.nodes == nodes and all(map(is_, known.slots, slots)):
                if i:
                    self._plans.insert(0, self._plans.pop(i))
                return PlannedBatch(known.plan, n_tokens, is_new=False)
        plan = self._new_plan(reqs, n_tokens)
        self._plans.insert(0, _KnownPlan(list(reqs), nodes, slots, plan))
        del self._plans[PLANS_KEPT:]
        return PlannedBatch(plan, n_tokens, is_new=True)

    def _new_plan(self, reqs: list[Any], n_tokens: tuple[int, ...]) -> CascadePlan:
        contexts = [
            Context(n, _shared_path(req.last_node, n))
            for req, n in zip(reqs, n_tokens, strict=True)
        ]
        plan = plan_batch(contexts, self.shape, self.device, self._max_levels)
        saving_s = net_saving_s(plan, self.shape, self.device)
        if not plan.levels or saving_s <= 0:
            return CascadePlan(len(contexts))
        pays = saving_s > self._eager_s or self.has_graph(plan)
        return plan if pays else CascadePlan(len(contexts))


def _never(plan: CascadePlan) -> bool:
    return False


def _shared_path(node: Any, n_tokens: int) -> tuple[Stretch, ...]:
    """The nodes whose slots a request surely uses; none if its node is not of the tree any more."""
    if node is None or node.is_root or node.end >= n_tokens:
        return ()
    path = path_of(node)
    return path if sum(tokens for _, tokens in path) == node.end else ()


def make_planner(model_runner: Any, why_not: str | None = None) -> CascadePlanner | None:
    """The planner of a rank's attention backend; None if it is to work as upstream's does.

    why_not: what the backend says that cascade attention does not support, if anything. Raises
    ConfigError if cascade attention was asked for and the model or the backend does not allow it.
    """
    server_args = model_runner.server_args
    if not cascade_option.is_wanted(server_args) or model_runner.is_draft_worker:
        return None
    reason = _why_not_for_model(model_runner) or why_not
    if reason is not None:
        if server_args.tiered_kv_cascade == "on":
            raise ConfigError(
                f"--tiered-kv-cascade on does not support {reason}; leave the option out."
            )
        logger.info("Tiered KV: no cascade attention, which does not support %s.", reason)
        return None
    outcome = arguments.resolved(server_args)
    config, tp_size = model_runner.model_config, outcome.tp_size
    shape = AttentionShape(
        n_query_heads=config.num_attention_heads // tp_size,
        n_kv_heads=config.get_num_kv_heads(tp_size),
        head_dim=config.head_dim,
        element_bytes=model_runner.token_to_kv_pool.dtype.itemsize,
    )
    has_graphs = outcome.device == "cuda" and not outcome.disable_cuda_graph
    eager_s = EAGER_S if has_graphs else 0.0
    return CascadePlanner(shape, cascade_device(nearest_device()), eager_s=eager_s)


def _why_not_for_model(model_runner: Any) -> str | None:
    if model_runner.use_mla_backend:
        return "models with multi-head latent attention, which gain nothing by it"
    if model_runner.sliding_window_size is not None:
        return "models with sliding-window attention"
    if model_runner.model_config.is_encoder_decoder:
        return "encoder-decoder models"
    return None


def planner_of(runner: Any) -> CascadePlanner | None:
    """The planner that the attention of a model runner or graph runner follows, if any."""
    return getattr(runner.attn_backend, "cascade", None)


def plan_launched(
    forward_batch: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """AFTER `ForwardBatch.init_new`."""
    planner = planner_of(model_runner)
    if planner is not None:
        planner.launch(forward_batch, batch)


def begin_pass(model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `ModelRunner.forward`."""
    planner = planner_of(model_runner)
    if planner is not None:
        planner.begin(forward_batch)
