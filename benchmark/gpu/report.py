"""What was measured, for people: tables in Markdown, and whether the targets were met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.gpu.serving import DEVICE, DISK, FRESH, HOST

Results = Mapping[str, Mapping[str, Any]]
"""Part to the JSON object that its file holds: `result` or `reason`."""

MEMCPY_SHARE_MIN = 0.9
INTERFERENCE_MAX = 0.03
HOST_SHARE_OF_RECOMPUTE_MAX = 0.2
HOST_TARGET_TOKENS = 32768


def report(results: Results) -> str:
    """Everything, part by part, then the targets."""
    sections = {
        "environment": environment,
        "kernels": kernels,
        "transfers": transfers,
        "cascade": cascade,
        "cascade_server": cascade_server,
        "serving": serving,
    }
    lines: list[str] = []
    for part, write in sections.items():
        if part not in results:
            continue
        lines.append(f"## {part}\n")
        found = results[part]
        lines += (
            write(found["result"]) if "result" in found else [f"Not measured: {found['reason']}"]
        )
        lines.append("")
    return "\n".join([*lines, "## targets\n", *targets(results)]) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def gb_s(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def ms(value: float) -> str:
    return f"{1000 * value:.3g}" if value < 1 else f"{1000 * value:.0f}"


def environment(result: Mapping[str, Any]) -> list[str]:
    device, peaks = result["device"], result["peaks"]
    pcie = device.get("pcie_peak_bytes_s")
    packages = ", ".join(f"{name} {v}" for name, v in result["packages"].items() if v)
    return [
        f"{device['name']}, {result['cores']} cores, {result['memory_bytes'] / 2**30:.0f} GiB.",
        f"Python {result['python']}; {packages}.",
        "",
        f"Matrix product in plain torch: {peaks['matmul_flops'] / 1e12:.1f} TFLOP/s.",
        f"Copy within the device: {gb_s(peaks['device_copy_bytes_s'])} GB/s read and written.",
        f"A launch and its end: {1e6 * peaks['launch_and_wait_s']:.0f} us.",
        *([f"PCIe, one way, at most: {gb_s(pcie)} GB/s."] if pcie else []),
    ]


def kernels(result: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            row["op"], row["format"], row["contender"], row["place"], f"{row['row_bytes']:,}",
            f"{row['gb_per_s']:.2f}", percent(row["of_memcpy"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    headings = ("op", "format", "by", "rows on", "page bytes", "GB/s of the pool", "of memcpy")
    wrong = [name for name, is_right in result["correct"].items() if not is_right]
    agreement = f"NOT as the reference: {', '.join(wrong)}." if wrong else "All as the reference."
    return [*table(headings, rows), "", agreement]


def transfers(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        name, exact = row["mover"], result["exact"].get(row["mover"])
        if row["reason"]:
            rows.append([name, row["direction"], "", "", "", "", f"not here: {row['reason']}"])
            continue
        rows.append(
            [
                name, row["direction"], f"{row['tokens']:,}", gb_s(row["bytes_per_s"]),
                percent(row["share_of_memcpy"]), percent(row["interference"]),
                {True: "exact", False: "DAMAGED", None: ""}[exact],
            ]
        )  # fmt: skip
    headings = (
        "way", "direction", "tokens", "GB/s", "of memcpy", "a pass beside it is longer by", "bytes",
    )  # fmt: skip
    alone = f"A forward pass alone: {ms(result['pass_alone_s'])} ms. Bytes are those of the pool."
    return [*table(headings, rows), "", alone]


def cascade(result: Mapping[str, Any]) -> list[str]:
    rows = result["rows"]
    if not rows:
        return ["No rows."]
    return table(
        [str(name).replace("_", " ") for name in rows[0]],
        [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows],
    )


def cascade_server(result: Mapping[str, Any]) -> list[str]:
    names = ("plain_ms", "off_ms", "on_ms", "plain_by_on", "off_by_on", "read_share")
    rows = [
        [f"{row['rows']}", f"{row['shared']:,}", *(f"{row[name]:.3g}" for name in names)]
        for row in result["rows"]
    ]
    headings = (
        "rows",
        "shared",
        "plain, ms",
        "off, ms",
        "on, ms",
        "plain / on",
        "off / on",
        "read",
    )
    return table(headings, rows)


def serving(result: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(sample["system"] for sample in result["samples"]))
    tokens = sorted({sample["tokens"] for sample in result["samples"]})
    rows = []
    for n in tokens:
        for state in (FRESH, DEVICE, HOST, DISK):
            cells = [cell(result, name, state, n) for name in names]
            rows.append([f"{n:,}", state, *cells])
    lines = table(("tokens", "asked", *(f"{name}, ms" for name in names)), rows)
    lines += ["", "TTFT; in brackets how many tokens were cached, and where.", ""]
    lines += table(
        ("decoding", "median, ms", "99th percentile, ms"),
        [
            [f"{name}, {found['n_decodes']} at once", ms(found["tpot_s"]), ms(found["tpot_p99_s"])]
            for name, found in result["decoding"].items()
        ],
    )
    return lines + [f"{name} failed: {reason}" for name, reason in result["failed"].items()]


def samples_of(result: Mapping[str, Any], system: str, state: str, tokens: int) -> list[Any]:
    key = (system, state, tokens)
    return [s for s in result["samples"] if (s["system"], s["state"], s["tokens"]) == key]


def cell(result: Mapping[str, Any], system: str, state: str, tokens: int) -> str:
    found = samples_of(result, system, state, tokens)
    if not found:
        return ""
    last = found[-1]
    tiers = ", ".join(f"{tier} {n:,}" for tier, n in last["by_tier"].items() if n)
    where = tiers or (f"{last['cached_tokens']:,}" if last["cached_tokens"] else "")
    return ms(statistics.median(s["ttft_s"] for s in found)) + (f" ({where})" if where else "")


def ttft_s(result: Mapping[str, Any], system: str, state: str, tokens: int) -> float | None:
    found = samples_of(result, system, state, tokens)
    return statistics.median(s["ttft_s"] for s in found) if found else None


def targets(results: Results) -> list[str]:
    """One line each: what was wanted, what was found."""
    if any(found["is_small"] for found in results.values()):
        return ["None: sizes for a test, and figures of such say nothing."]
    lines = []
    moved = results.get("transfers", {}).get("result")
    if moved:
        rows = [r for r in moved["rows"] if r["mover"] == "ours"]
        largest = max(r["tokens"] for r in rows)
        for r in (r for r in rows if r["tokens"] == largest):
            share, felt = r["share_of_memcpy"], r["interference"]
            name = f"{r['direction']}, {largest:,} tokens"
            lines.append(verdict(f"{name}: share of memcpy", share, share >= MEMCPY_SHARE_MIN, 0.9))
            lines.append(
                verdict(f"{name}: interference, unlimited", felt, felt <= INTERFERENCE_MAX, 0.03)
            )
    gangs = results.get("cascade_server", {}).get("result")
    if gangs:
        least = min(row["off_by_on"] for row in gangs["rows"])
        lines.append(verdict("least gain of an iteration by cascade", least, least >= 1, 1))
    served = results.get("serving", {}).get("result")
    if served:
        lines += serving_targets(served)
    return lines or ["Nothing was measured that they speak of."]


def serving_targets(served: Mapping[str, Any]) -> list[str]:
    lines = []
    for n in sorted({sample["tokens"] for sample in served["samples"]}):
        host, fresh = ttft_s(served, "tiered", HOST, n), ttft_s(served, "plain", FRESH, n)
        if host is not None and fresh is not None and n >= HOST_TARGET_TOKENS:
            share = host / fresh
            is_met = share <= HOST_SHARE_OF_RECOMPUTE_MAX
            lines.append(verdict(f"{n:,} tokens from host: share of recompute", share, is_met, 0.2))
        theirs = ttft_s(served, "hicache", HOST, n)
        if host is not None and theirs is not None:
            share = host / theirs
            lines.append(
                verdict(f"{n:,} tokens from host: share of HiCache's", share, share <= 1, 1)
            )
    return lines


def verdict(what: str, found: float, is_met: bool, wanted: float) -> str:
    return f"- {'met' if is_met else 'MISSED'}: {what} {found:.3f} (target {wanted:g})"
