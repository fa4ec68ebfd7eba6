"""The answers of `answers`, from servers that do more: without CUDA graphs, with cascade attention
in graphs and without, and with requests that make way for others and come back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmark.gpu import record, systems
from benchmark.gpu.answers import (
    AS_PLAIN,
    FRESH,
    STATES,
    STEP,
    Answers,
    Questions,
    ask_states,
    check,
    compared,
    gives_up,
    sizes_of,
    together,
)
from benchmark.gpu.record import Record
from benchmark.gpu.setting import NotHereError, Setting

EAGER = ("--disable-cuda-graph",)
CASCADE = ("--tiered-kv-cascade", "on")
#: A part of those who run decodes, the others make way: their KV goes to the host and comes back.
MAKE_WAY = ("--tiered-kv-iteration-policy", "round-robin")


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """All servers at once. Raises NotHereError before `answers` has plain SGLang's answers."""
    before = record.read(setting.folder / f"{STEP}.json") or {}
    plain = before.get("result", {}).get("plain")
    if plain is None or not plain.get("strangers"):
        raise NotHereError("plain SGLang's answers are missing: `answers` must come first")
    sizes, questions = sizes_of(setting), Questions(sizes_of(setting))
    model = systems.write_model(setting.folder / "model", setting.is_small)
    eager = EAGER if setting.on_gpu else ()
    variants = {
        "eager": eager,
        "cascade": CASCADE,
        "cascade_eager": (*CASCADE, *eager),
        "make_way": MAKE_WAY,
    }
    if not setting.on_gpu:
        # There are no graphs to do without.
        variants = {name: flags for name, flags in variants.items() if "eager" not in name}
    result: dict[str, Any] = {"start_s": {}, "wrong": {}}
    with systems.emptied(setting.folder / "answers_more_disk") as disk:
        servers = {}
        for name, flags in variants.items():
            common = systems.common_flags(setting, sizes.page, sizes.device)
            tiered = systems.tiered_flags(
                setting, sizes.host * sizes.token_bytes, disk / name, n_servers=len(variants)
            )
            tiered += AS_PLAIN
            servers[name] = systems.server_of(
                "answers_more", name, setting, model, [*common, *tiered, *flags]
            )
        with systems.up_together(servers) as (up, failed):
            result["failed"] = failed
            result["start_s"] = {name: server.start_seconds for name, server in up.items()}
            result["captures"] = {name: systems.captures(server) for name, server in up.items()}
            for name, server in up.items():
                found = Answers()
                states = STATES if name == "eager" else STATES[: STATES.index(FRESH) + 1]
                with gives_up(name, result):
                    for _ in ask_states(server, questions, states, found):
                        notes.so_far(result)
                    found.gang = together(server, questions.gang, sizes.gang_new)
                    found.strangers = together(server, questions.strangers, sizes.gang_new)
                    result[name] = asdict(found)
                    alike = EAGER[0] not in server.args
                    result[f"{name}_compared"] = compared(found, plain, rounds_alike=alike)
                    result["wrong"][name] = result[f"{name}_compared"]["wrong"]
                notes.so_far(result)
            result["trouble"] = systems.trouble(up)
            notes.so_far(result)
    check(result)
    return result
