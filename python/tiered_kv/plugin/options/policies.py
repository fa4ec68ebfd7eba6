"""The options of the policies: who is admitted, who decodes, and how attention reads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.plugin.options import cascade, decode, refusals, values
from tiered_kv.plugin.upstream.current import arguments
from tiered_kv.scheduler.iteration_policy import iteration_policies
from tiered_kv.scheduler.request_policy import REQUEST_POLICY_DEFAULT, request_policies

SCHEDULE_POLICY_DEFAULT: str = arguments.stock_default("schedule_policy")


def _cascade_mode(_option: str, text: str) -> str:
    return cascade.cascade_mode(text)


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class PolicyArgs:
    """Mixed into `ServerArgs`."""

    if TYPE_CHECKING:  # SGLang's
        schedule_policy: str
        enable_priority_scheduling: bool

    tiered_kv_policy: A[
        str | None,
        Arg(
            no_cli=True,
            type_parser=values.argument(values.request_policy),
            help="Who of the waiting requests is admitted next: "
            f"{', '.join(request_policies.names())}, or 'upstream' for what --schedule-policy "
            f"says. Default: {REQUEST_POLICY_DEFAULT}, but upstream if --schedule-policy or "
            "--enable-priority-scheduling is given.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_never_pause: A[
        bool,
        Arg(
            no_cli=True,
            help="Do not have whole programs pause at their tool boundaries while the contexts of "
            "those in progress fill device and host, as slack does where no deadline decides.",
        ),
        NS("memory"),
    ] = False
    tiered_kv_iteration_policy: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.named_in(iteration_policies),
            help="Who of the running requests decodes in an iteration: all (default: everyone, as "
            "SGLang does it), slack (everyone where all next tokens are in time; else those with "
            "the tightest tbt_ms always and the others in turns, which keep their KV meanwhile) or "
            "round-robin. Where memory is short, slack has loose requests make way for tight ones; "
            "they come back without recompute. Needs a --tiered-kv-policy but upstream.",
        ),
        NS("memory"),
    ] = "all"
    tiered_kv_cascade: A[
        str,
        Arg(
            no_cli=True,
            type_parser=values.argument(_cascade_mode),
            help="Read KV that decoding requests share once for all, where that pays: on (on a GPU "
            "with --attention-backend flashinfer), off, or auto (default: on only on a CPU).",
        ),
        NS("memory"),
    ] = "auto"
    tiered_kv_debug_integrity: A[
        bool,
        Arg(
            no_cli=True,
            help="Check the cache's bookkeeping whenever the server is idle, and stop the server "
            "if it is inconsistent. Costs time proportional to the cache.",
        ),
        NS("memory"),
    ] = False

    def resolve_policies(self) -> None:
        """Decide who orders the waiting queue. Raises ConfigError if two are to.

        And for an iteration policy that cannot work beside that.
        """
        self.tiered_kv_cascade = cascade.cascade_mode(self.tiered_kv_cascade)
        if self.tiered_kv_policy is None:
            is_named = (
                self.schedule_policy != SCHEDULE_POLICY_DEFAULT or self.enable_priority_scheduling
            )
            self.tiered_kv_policy = values.UPSTREAM_POLICY if is_named else REQUEST_POLICY_DEFAULT
        values.request_policy("--tiered-kv-policy", self.tiered_kv_policy)
        refusals.check_one_orders_the_queue(self)
        decode.check(self.tiered_kv_iteration_policy, self.tiered_kv_policy)
