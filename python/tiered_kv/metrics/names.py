"""Every metric of the project: name, kind, labels and meaning. `docs/operations.md` lists them.

Names follow the engine's own (prefix `sglang:`), since they are scraped from the same endpoint.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels` are the metric's own, beside those the engine puts on all of its metrics."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    """Of a histogram: the upper bounds of its buckets."""


TRANSFER_SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WAIT_SECONDS_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SLACK_SECONDS_BUCKETS = (-30.0, -10.0, -3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


HIT_TOKENS = Metric(
    "sglang:tiered_kv_hit_tokens_total",
    Kind.COUNTER,
    ("tier",),
    "Prompt tokens of finished requests whose KV came from this tier.",
)
PROMPT_TOKENS = Metric(
    "sglang:tiered_kv_prompt_tokens_total",
    Kind.COUNTER,
    (),
    "Prompt tokens of finished requests, cached or not.",
)
TRANSFER_BYTES = Metric(
    "sglang:tiered_kv_transfer_bytes_total",
    Kind.COUNTER,
    ("source", "target"),
    "KV bytes moved from one tier to another.",
)
TRANSFER_SECONDS = Metric(
    "sglang:tiered_kv_transfer_seconds",
    Kind.HISTOGRAM,
    ("source", "target"),
    "Time from asking for a transfer to its end, queueing included.",
    TRANSFER_SECONDS_BUCKETS,
)
RESIDENT_TOKENS = Metric(
    "sglang:tiered_kv_resident_tokens",
    Kind.GAUGE,
    ("tier",),
    "Tokens whose KV can be read from this tier now.",
)
CAPACITY_TOKENS = Metric(
    "sglang:tiered_kv_capacity_tokens",
    Kind.GAUGE,
    ("tier",),
    "Tokens that this tier has room for.",
)
PINNED_TOKENS = Metric(
    "sglang:tiered_kv_pinned_tokens",
    Kind.GAUGE,
    ("tier",),
    "Tokens that may not be evicted from this tier now: a request or a transfer uses them.",
)
QUEUE_DEPTH = Metric(
    "sglang:tiered_kv_queue_depth",
    Kind.GAUGE,
    ("source", "target"),
    "Transfers asked for and not acknowledged yet.",
)
DEFERRED_NODES = Metric(
    "sglang:tiered_kv_deferred_nodes",
    Kind.GAUGE,
    (),
    "Runs of pages that wait for room before they are written to host or disk.",
)
WRITE_BACK_LIMIT = Metric(
    "sglang:tiered_kv_write_back_limit_bytes_per_second",
    Kind.GAUGE,
    (),
    "Bytes a second that may be written to host and disk while requests decode; +Inf if there is "
    "no limit.",
)
UNWRITTEN_PAGES = Metric(
    "sglang:tiered_kv_unwritten_pages_total",
    Kind.COUNTER,
    ("target",),
    "Pages that were to be copied to this tier and were not: the copy failed or was refused, a "
    "flush took them away, or the disk was cleared meanwhile.",
)
FAILED_LOADS = Metric(
    "sglang:tiered_kv_failed_loads_total",
    Kind.COUNTER,
    (),
    "Forward passes that were repeated because pages could not be copied to the device.",
)
DISK_SUSPENDED = Metric(
    "sglang:tiered_kv_disk_suspended",
    Kind.GAUGE,
    (),
    "1 while the disk tier is not used because KV of several weights is cached, else 0.",
)
DISK_BYTES = Metric(
    "sglang:tiered_kv_disk_bytes",
    Kind.GAUGE,
    (),
    "Bytes that the disk tier occupies, index included.",
)
DISK_DEGRADED = Metric(
    "sglang:tiered_kv_disk_degraded",
    Kind.GAUGE,
    (),
    "1 while the disk tier takes no writes because of an error (disk full, I/O error, no answer), "
    "or could not be opened, else 0.",
)
STORE_DEGRADED = Metric(
    "sglang:tiered_kv_store_degraded",
    Kind.GAUGE,
    (),
    "1 while the shared store is not asked, read or written because of an error or because it did "
    "not answer in time, else 0.",
)
STORE_CALLS = Metric(
    "sglang:tiered_kv_store_calls_total",
    Kind.COUNTER,
    ("operation", "outcome"),
    "Calls to the shared store: ask (what it has), read and write, by outcome (ok, failed).",
)
STORE_CALL_SECONDS = Metric(
    "sglang:tiered_kv_store_call_seconds_total",
    Kind.COUNTER,
    ("operation",),
    "Seconds that these calls took; over their number it is the mean.",
)
STORE_BAD_PAGES = Metric(
    "sglang:tiered_kv_store_bad_pages_total",
    Kind.COUNTER,
    (),
    "What the shared store returned for a page and was not that page, whole; it was computed.",
)
DISK_IO_BYTES = Metric(
    "sglang:tiered_kv_disk_io_bytes_total",
    Kind.COUNTER,
    ("path", "operation"),
    "Bytes that the disk tier read or wrote past the page cache (direct) or through it (buffered).",
)
DISK_PAGE_CACHE = Metric(
    "sglang:tiered_kv_disk_page_cache",
    Kind.GAUGE,
    (),
    "1 while pages wanted again soon go through the page cache, 0 while all bypass it.",
)
WAIT_SECONDS = Metric(
    "sglang:tiered_kv_wait_seconds",
    Kind.HISTOGRAM,
    ("slo_class",),
    "Time from a request's arrival at the server to its first admission.",
    WAIT_SECONDS_BUCKETS,
)
FIRST_TOKEN_SLACK = Metric(
    "sglang:tiered_kv_first_token_slack_seconds",
    Kind.HISTOGRAM,
    ("slo_class",),
    "Time left until a request's first token was due when it was there; negative if it was late.",
    SLACK_SECONDS_BUCKETS,
)
SLO_REQUESTS = Metric(
    "sglang:tiered_kv_slo_requests_total",
    Kind.COUNTER,
    ("slo_class", "met"),
    "Answered requests that had a latency objective, by whether it was met (true, false): the "
    "first token in time, and the mean time between the others.",
)
WAIT_OVER_BOUND = Metric(
    "sglang:tiered_kv_wait_over_bound_seconds",
    Kind.GAUGE,
    (),
    "By how much the bound on waiting is exceeded for the request that exceeds it most; else 0.",
)
DECODE_CONTEXT_TOKENS = Metric(
    "sglang:tiered_kv_decode_context_tokens_total",
    Kind.COUNTER,
    (),
    "Tokens that decoding requests attended to, each counted for each of its requests: what every "
    "layer would read without cascade attention.",
)
DECODE_READ_TOKENS = Metric(
    "sglang:tiered_kv_decode_read_tokens_total",
    Kind.COUNTER,
    (),
    "Tokens whose KV every layer read for that, those of a group once.",
)
PARTIAL_DECODES = Metric(
    "sglang:tiered_kv_partial_decodes_total",
    Kind.COUNTER,
    (),
    "Decode iterations in which somebody was parked.",
)
MADE_WAY = Metric(
    "sglang:tiered_kv_made_way_total",
    Kind.COUNTER,
    (),
    "Times that a running request went back to the queue, with its KV, for one that waited.",
)

ORDERS = Metric(
    "sglang:tiered_kv_control_total",
    Kind.COUNTER,
    ("action",),
    "Orders of administrators about single prompts, by action (inspect, prefetch, keep, demote, "
    "drop).",
)
KEPT_TOKENS = Metric(
    "sglang:tiered_kv_kept_tokens",
    Kind.GAUGE,
    ("tier", "tenant"),
    "Tokens that administrators keep in this tier for a while, for this tenant; those of more than "
    "16 tenants together as others.",
)
KEEPS_GIVEN_UP = Metric(
    "sglang:tiered_kv_keeps_given_up_tokens_total",
    Kind.COUNTER,
    ("tier",),
    "Tokens that were kept in this tier and left it all the same, as nothing else was left.",
)

OF_THE_STORE = (STORE_DEGRADED, STORE_CALLS, STORE_CALL_SECONDS, STORE_BAD_PAGES)
"""Those that only a server with a shared store has."""

ALL: tuple[Metric, ...] = (
    HIT_TOKENS,
    PROMPT_TOKENS,
    TRANSFER_BYTES,
    TRANSFER_SECONDS,
    RESIDENT_TOKENS,
    CAPACITY_TOKENS,
    PINNED_TOKENS,
    QUEUE_DEPTH,
    DEFERRED_NODES,
    WRITE_BACK_LIMIT,
    UNWRITTEN_PAGES,
    FAILED_LOADS,
    DISK_SUSPENDED,
    DISK_BYTES,
    DISK_DEGRADED,
    *OF_THE_STORE,
    DISK_IO_BYTES,
    DISK_PAGE_CACHE,
    WAIT_SECONDS,
    FIRST_TOKEN_SLACK,
    SLO_REQUESTS,
    WAIT_OVER_BOUND,
    DECODE_CONTEXT_TOKENS,
    DECODE_READ_TOKENS,
    PARTIAL_DECODES,
    MADE_WAY,
    ORDERS,
    KEPT_TOKENS,
    KEEPS_GIVEN_UP,
)
