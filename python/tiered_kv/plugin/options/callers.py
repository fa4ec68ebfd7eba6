"""The options that say what callers may ask for, and whose word counts."""

from __future__ import annotations

import dataclasses

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.api.fields import LATENCY_MS_MAX
from tiered_kv.api.slo import SloClasses
from tiered_kv.api.trust import SLO_SOURCES, TENANT_SOURCES, Trust
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import values


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class CallerArgs:
    """Mixed into `ServerArgs`."""

    tiered_kv_slo_classes: A[
        str | None,
        Arg(
            no_cli=True,
            help="File (JSON or TOML) with the classes that a request's slo may name, instead of "
            "the built-in interactive, standard and batch: each maps to ttft_ms, tbt_ms and "
            "max_wait_ms, all optional.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_default_slo_class: A[
        str | None,
        Arg(
            no_cli=True,
            help="The class of requests that name none; 'none' promises them nothing. Default: "
            "standard.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_slo_from: A[
        str,
        Arg(
            no_cli=True,
            help="Whose word counts for a request's class and objectives: body (default: the "
            "caller's own, in the body or in x-slo-* headers), headers (a gateway's, which must "
            "replace the caller's; a body that names any is refused) or none (every request has "
            "the default class).",
        ),
        NS("memory"),
    ] = "body"
    tiered_kv_tenant_from: A[
        str,
        Arg(
            no_cli=True,
            help="Whose word counts for a request's tenant: key (default: the API key that it came "
            "with; without one all are one tenant), headers (x-slo-tenant, set by a gateway) or "
            "body (slo.tenant: only where callers trust each other, since names cost nothing).",
        ),
        NS("memory"),
    ] = "key"
    tiered_kv_least_ttft_ms: A[
        float | None,
        Arg(
            no_cli=True,
            type_parser=float,
            help="The least ttft_ms that a request may ask for: less is raised to it. A class may "
            "have less. Default: no limit.",
        ),
        NS("memory"),
    ] = None
    tiered_kv_least_tbt_ms: A[
        float | None,
        Arg(no_cli=True, type_parser=float, help="The same for tbt_ms."),
        NS("memory"),
    ] = None

    def trust(self) -> Trust:
        """Whose word counts for what."""
        return Trust(
            self.tiered_kv_slo_from,
            self.tiered_kv_tenant_from,
            self.tiered_kv_least_ttft_ms,
            self.tiered_kv_least_tbt_ms,
        )

    def slo_classes(self) -> SloClasses:
        """The classes that requests may name, and the default one. Raises ConfigError."""
        return values.slo_classes(
            "--tiered-kv-default-slo-class",
            self.tiered_kv_slo_classes,
            self.tiered_kv_default_slo_class,
        )

    def resolve_callers(self) -> None:
        """Check all, and replace the file of classes by what it says, for other processes.

        Raises ConfigError.
        """
        for option, value, known in (
            ("--tiered-kv-slo-from", self.tiered_kv_slo_from, SLO_SOURCES),
            ("--tiered-kv-tenant-from", self.tiered_kv_tenant_from, TENANT_SOURCES),
        ):
            if value not in known:
                raise ConfigError(f"{option} must be one of {', '.join(known)}, not {value!r}.")
        for option, least in (
            ("--tiered-kv-least-ttft-ms", self.tiered_kv_least_ttft_ms),
            ("--tiered-kv-least-tbt-ms", self.tiered_kv_least_tbt_ms),
        ):
            if least is not None and not 0 < least <= LATENCY_MS_MAX:
                raise ConfigError(
                    f"{option} must be a number of milliseconds above 0, at most "
                    f"{LATENCY_MS_MAX}, not {least:g}."
                )
        if self.tiered_kv_slo_classes is not None:
            self.tiered_kv_slo_classes = values.slo_table(
                "--tiered-kv-slo-classes", self.tiered_kv_slo_classes
            )
        self.slo_classes()
