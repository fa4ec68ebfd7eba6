"""The options that describe a simulation, shared by the commands."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiered_kv.core.device_spec import DEVICES, find_device
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import MODELS, find_model
from tiered_kv.core.units import parse_bytes
from tiered_kv.memory.eviction import eviction_policies
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import iteration_policies
from tiered_kv.scheduler.request_policy import request_policies
from tiered_kv.simulation.jobs import Job, WorkloadChoice
from tiered_kv.simulation.measured_server import read_measured_server
from tiered_kv.simulation.policies import SIMULATED, SIMULATED_ORDERS, request_order
from tiered_kv.simulation.server_defaults import (
    default_cascade,
    default_chunk_tokens,
    default_host_bytes,
    server_defaults,
)
from tiered_kv.simulation.settings import STOP_POLICIES, Belief, CacheSettings, InstanceSettings
from tiered_kv.simulation.statistics import TBT_CRITERIA
from tiered_kv.simulation.workload import catalog


def add_simulation_arguments(parser: argparse.ArgumentParser, *, as_server: bool = False) -> None:
    """Add what `job_from` reads. as_server: with the defaults that a server has."""
    _add_workload_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--model", default="Llama-3.1-8B", help=f"one of {', '.join(sorted(MODELS))}"
    )
    server.add_argument(
        "--device",
        default="H200-141",
        help=f"one of {', '.join(sorted(DEVICES))}, or a tensor-parallel group as 4xH200-141",
    )
    server.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="times of a real server, as benchmark/simulation/measure.py wrote them, instead of "
        "the roofline of --model and --device; give --device-kv as well",
    )
    server.add_argument(
        "--server-defaults",
        action="store_true",
        help="what is not given is as on a server that is given nothing but --tiered-kv: the "
        "policy slack; three tiers, a host of twice the device's KV pool and a disk of 32 GB; "
        "--load-policy cost --stop-policy patience; SGLang's chunk for the device",
    )
    orders = ", ".join([*request_policies.names(), *SIMULATED_ORDERS])
    server.add_argument("--policy", default="fcfs", help=f"order of waiting requests: {orders}")
    _add_iteration_arguments(server)
    server.add_argument("--chunk", type=int, default=8192, help="prefill tokens per iteration")
    server.add_argument("--max-running", type=int, default=256, help="requests decoding at once")
    server.add_argument(
        "--mixed-chunk", action="store_true", help="decode in the iterations that prefill"
    )
    server.add_argument(
        "--cascade",
        action="store_true",
        help="read a prefix that several requests share once per decode iteration",
    )
    server.add_argument(
        "--max-new-tokens",
        default="2048",
        metavar="N|exact",
        help="the limit that clients set; exact: the length of the answer, which then is known",
    )
    server.add_argument(
        "--noise", type=float, default=0.0, help="relative noise of forward passes, such as 0.05"
    )
    _add_belief_arguments(parser)
    _add_cache_arguments(parser)
    parser.add_argument(
        "--tbt-criterion",
        choices=sorted(TBT_CRITERIA),
        default="mean",
        help="which time between a request's tokens must meet its objective",
    )
    if as_server:
        parser.set_defaults(**server_defaults())


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    catalog.add_arguments(parser)
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        metavar="S",
        help="delay each arrival by up to S seconds at random; 3 undoes the resolution of "
        "Mooncake's traces",
    )
    parser.add_argument(
        "--turns", type=int, metavar="N", help="only the first N calls of each session"
    )


def _add_iteration_arguments(server: argparse._ArgumentGroup) -> None:
    server.add_argument(
        "--iteration-policy",
        default="all",
        help="which running requests decode in an iteration: "
        f"{', '.join(iteration_policies.names())}; all: everyone, as SGLang does; slack: everyone "
        "if that is in time, else those whose next tokens are due, the others being parked",
    )
    server.add_argument(
        "--relegate",
        action="store_true",
        help="with --iteration-policy slack: when not everyone with the tightest token objective "
        "can be in time, give up some of them for the others",
    )
    server.add_argument(
        "--swap",
        action="store_true",
        help="requests that memory runs out for keep their KV as cache; with --iteration-policy "
        "slack some also make way for those with tighter objectives",
    )


def _add_belief_arguments(parser: argparse.ArgumentParser) -> None:
    belief = parser.add_argument_group(
        "belief", "what policies and placement take the machine for, against what it is"
    )
    for part, what in (
        ("prefill", "passes that prefill"),
        ("decode", "passes that decode"),
        ("links", "transfers between tiers"),
    ):
        belief.add_argument(
            f"--believed-{part}",
            type=float,
            default=1.0,
            metavar="X",
            help=f"{what} are believed to take X times what they do: 0.7 is a machine that is "
            "slower than it is taken for (default 1)",
        )
    belief.add_argument(
        "--learn",
        action="store_true",
        help="learn from each pass and transfer, as a server does",
    )


def _add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--eviction",
        default="lru",
        help=f"{', '.join([*eviction_policies.names(), *SIMULATED])}; belady knows the future, "
        "kvflow when each session's next call is expected; tlru: T-LRU, as upstream's",
    )
    cache.add_argument(
        "--forecast-filter",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pass over what the forecast expects soon, as the server does (default)",
    )
    cache.add_argument(
        "--hints",
        action="store_true",
        help="clients say when their session's next call will come, and the server forecasts it",
    )
    cache.add_argument(
        "--learn-pauses",
        action="store_true",
        help="the server learns how long sessions pause between calls, and forecasts the next ones",
    )
    cache.add_argument(
        "--whole-leaves",
        action="store_true",
        help="evict whole leaves of the prefix tree, as plain SGLang does, not only as much as is "
        "needed; not with belady and kvflow",
    )
    cache.add_argument("--device-kv", type=parse_bytes, metavar="SIZE", help="KV pool, as 80GB")
    cache.add_argument("--host", type=parse_bytes, default=0, metavar="SIZE", help="host tier")
    cache.add_argument("--disk", type=parse_bytes, default=0, metavar="SIZE", help="disk tier")
    cache.add_argument(
        "--stop-policy",
        choices=STOP_POLICIES,
        default="wait_complete",
        help="when a request stops waiting for its pages from disk: HiCache's three, and patience, "
        "the server's own with --load-policy cost",
    )
    cache.add_argument(
        "--load-policy",
        choices=("always", "cost", "never"),
        default="always",
        help="whether pages in a farther tier are loaded; cost: as many as pay",
    )


def job_from(arguments: argparse.Namespace, **labels: Any) -> Job:
    """The job that parsed options describe. Raises ConfigError for unknown names."""
    limit = arguments.max_new_tokens
    if limit != "exact" and not limit.isdigit():
        raise ConfigError(f"The limit of new tokens is a number or exact, not {limit!r}.")
    if arguments.eviction not in SIMULATED:
        eviction_policies.get(arguments.eviction)
    request_order(arguments.policy)
    iteration_policies.get(arguments.iteration_policy)
    device = find_device(arguments.device)
    chunk, cascade = arguments.chunk, arguments.cascade
    settings = InstanceSettings(
        model=find_model(arguments.model),
        device=device,
        policy=arguments.policy,
        iteration_policy=arguments.iteration_policy,
        iteration=IterationConfig(relegate=arguments.relegate),
        swap=arguments.swap,
        chunk_tokens=default_chunk_tokens(device) if chunk is None else chunk,
        max_running=arguments.max_running,
        mixed_chunk=arguments.mixed_chunk,
        cascade=default_cascade(device) if cascade is None else cascade,
        max_new_tokens=None if limit == "exact" else int(limit),
        noise=arguments.noise,
        belief=Belief(
            prefill=arguments.believed_prefill,
            decode=arguments.believed_decode,
            links=arguments.believed_links,
            learns=arguments.learn,
        ),
        cache=CacheSettings(
            device_bytes=arguments.device_kv,
            host_bytes=arguments.host or 0,
            disk_bytes=0 if arguments.host is None else arguments.disk,
            eviction=arguments.eviction,
            protect_expected=arguments.forecast_filter,
            hints=arguments.hints,
            learn_pauses=arguments.learn_pauses,
            whole_leaves=arguments.whole_leaves,
            stop_policy=arguments.stop_policy,
            load_policy=arguments.load_policy,
        ),
    )
    if arguments.measured is not None:
        settings = read_measured_server(arguments.measured).applied_to(settings)
    if arguments.host is None:
        pool_bytes = settings.device_tokens() * settings.model.kv_bytes_per_token
        host_bytes = default_host_bytes(pool_bytes)
        cache = replace(settings.cache, host_bytes=host_bytes, disk_bytes=arguments.disk)
        settings = replace(settings, cache=cache)
    return Job(
        workload=WorkloadChoice(
            spec=arguments.workload,
            rate=arguments.rate,
            length=arguments.length,
            pause=arguments.pause,
            limit=arguments.limit,
            spread_s=arguments.spread,
            turns=arguments.turns,
            slo_mix=arguments.slo_mix,
            seed=arguments.seed,
        ),
        settings=settings,
        seed=arguments.seed,
        criterion=arguments.tbt_criterion,
        labels=labels,
    )
