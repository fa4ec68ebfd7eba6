"""Whatever stands in a trace, a log or a config.json: it is read, or refused in one sentence."""

from __future__ import annotations

import copy
import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from support_plan import released
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_config import read_shape
from tiered_kv.plan.weights import Kind, Part, parts_of_shape, weight_bytes
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.readers.agent_sessions import read_agent_sessions
from tiered_kv.simulation.workload.readers.chat_log import read_chat_log
from tiered_kv.simulation.workload.readers.length_csv import read_azure, read_burstgpt
from tiered_kv.simulation.workload.readers.mooncake import read_mooncake

Result = TypeVar("Result")

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 64, 1 << 31, 1 << 70, 1777629600, 1777629600000])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)

CHAT = {
    "timestamp": "2026-05-01T10:00:00Z",
    "session_id": "s",
    "output": {"role": "assistant", "content": "ok"},
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "function": {"name": "ls", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a.txt"}]},
    ],
}
BATCH = {"custom_id": "1", "url": "/v1/responses", "body": {"input": CHAT["messages"]}}
SHAREGPT = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
MOONCAKE = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}
AGENTS = {
    "block_size": 64,
    "tool_tokens": 0,
    "system_tokens": 64,
    "requests": [{"t": 0, "in": 70, "out": 2, "lcp": 0, "new": [[1, 1]], "think_time": 1.0}],
}
READERS: list[tuple[Callable[[Path], Any], dict[str, Any]]] = [
    (read_chat_log, CHAT),
    (read_chat_log, BATCH),
    (read_chat_log, SHAREGPT),
    (read_mooncake, MOONCAKE),
    (read_agent_sessions, AGENTS),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything within `value`."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
        else:
            found.append((*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with something in it replaced by anything."""
    result = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places(record)))
        within: Any = result
        try:
            for key in way:
                within = within[key]
            within[last] = draw(VALUES)
        except (TypeError, LookupError):
            # It stood in what was replaced before.
            continue
    return result


def read_or_refused(read: Callable[[], Result]) -> Result | None:
    """What `read` gives, or None if it refuses in one sentence."""
    refusal = ""
    try:
        return read()
    except (WorkloadError, ConfigError) as error:
        refusal = str(error)
    assert refusal.endswith(".")
    assert "\n" not in refusal
    return None


@settings(deadline=None)
@given(st.data())
def test_a_trace_is_read_or_refused(data: st.DataObject) -> None:
    reader, record = data.draw(st.sampled_from(READERS))
    records = [record, data.draw(changed(record))]
    as_array = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        lines = "".join(json.dumps(entry) + "\n" for entry in records)
        path.write_text(json.dumps(records) if as_array else lines)
        requests = read_or_refused(lambda: list(reader(path).initial()))
        assert requests is None or requests
        for request in requests or ():
            assert request.arrival_s >= 0
            assert request.input_tokens > 0


@settings(deadline=None)
@given(st.lists(st.lists(VALUES, max_size=4), max_size=4), st.sampled_from([0, 1]))
def test_a_table_is_read_or_refused(rows: list[list[Any]], which: int) -> None:
    reader, header = (
        (read_azure, ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]),
        (read_burstgpt, ["Timestamp", "Request tokens", "Response tokens"]),
    )[which]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([header, *rows])
        requests = read_or_refused(lambda: list(reader(path).initial()))
        assert requests is None or requests


CONFIGS = [value for name, value in vars(released).items() if name.isupper()]


@settings(deadline=None)
@given(st.data())
def test_a_config_is_read_or_refused(data: st.DataObject) -> None:
    config = data.draw(changed(data.draw(st.sampled_from(CONFIGS))))
    shape = read_or_refused(lambda: read_shape(config, "some-model"))
    if shape is not None:
        assert any(layers.kv_elements for layers in shape.kv_layers)
        read_or_refused(lambda: weight_bytes(parts_of_shape(shape), config, "some-model"))


QUANTISED = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*": {"bits": 8}}},
    {
        "quant_method": "compressed-tensors",
        "ignore": ["re:.*"],
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    },
    {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": {"quant_algo": "FP8"}}},
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 4}}},
]
PARTS = [Part("model.layers.0.mlp.experts", 10, Kind.EXPERT), Part("lm_head", 10, Kind.HEAD)]


@settings(deadline=None)
@given(st.data())
def test_a_quantisation_is_read_or_refused(data: st.DataObject) -> None:
    block = data.draw(changed(data.draw(st.sampled_from(QUANTISED))))
    config = {"quantization_config": block}
    n_bytes = read_or_refused(lambda: weight_bytes(PARTS, config, "some-model"))
    assert n_bytes is None or n_bytes > 0
