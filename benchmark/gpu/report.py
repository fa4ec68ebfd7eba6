"""What was measured, for people: tables in Markdown, and whether the targets were met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmark.gpu.plan import NAMES, STEPS
from benchmark.gpu.record import DONE

Results = Mapping[str, Mapping[str, Any]]
"""Step to what its file holds (record.py)."""

#: As `answers` calls them; nothing of SGLang is imported here.
FRESH, DEVICE, HOST, DISK = "new", "again", "after others", "after a flush"

MEMCPY_SHARE_MIN = 0.9
INTERFERENCE_MAX = 0.03
HOST_SHARE_OF_RECOMPUTE_MAX = 0.2
HOST_TARGET_TOKENS = 32768
#: Of the gain that the bytes read would allow, the part that cascade's kernels must reach; and how
#: much sooner a token must come.
CASCADE_ROWS, CASCADE_SHARED = 64, 8192
OF_BYTES_MIN, TPOT_GAIN_MIN = 0.8, 1.5


def report(results: Results) -> str:
    """What became of each step, every step's tables, then the targets."""
    lines = ["## steps\n", *table(("step", "state", "seconds", "limit"), states(results)), ""]
    for name in NAMES:
        found = results.get(name, {})
        if not found.get("result"):
            continue
        try:
            written = SECTIONS[name](found["result"])
        except (KeyError, IndexError, TypeError, ValueError):
            # A step that was stopped has what it had come to.
            written = ["What there is makes no table yet: see its file."]
        for server, trouble in found["result"].get("trouble", {}).items():
            written = [*written, "", f"The log of {server} tells of trouble: {trouble[0]}"]
        lines += [f"## {name}\n", *written]
        if found["state"] != DONE:
            lines += ["", f"Not all of it: {found.get('reason', found['state'])}"]
        lines.append("")
    return "\n".join([*lines, "## targets\n", *targets(results)]) + "\n"


def states(results: Results) -> list[list[str]]:
    rows = []
    for step in STEPS:
        found = results.get(step.name)
        state = "not tried" if found is None else str(found["state"])
        if found is not None and "reason" in found:
            state += f": {found['reason']}"
        seconds = "" if found is None else f"{found.get('seconds', 0):.0f}"
        rows.append([step.name, state.replace("|", "/"), seconds, f"{step.limit_s:.0f}"])
    return rows


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
    if not result["correct"]:
        return table(headings, rows)
    wrong = [name for name, is_right in result["correct"].items() if not is_right]
    agreement = f"NOT as the reference: {', '.join(wrong)}." if wrong else "All as the reference."
    return [*table(headings, rows), "", agreement]


def copies(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        name, exact = row["mover"], result["exact"].get(row["mover"])
        if row["reason"]:
            rows.append([name, row["direction"], "", "", "", "", "", f"not here: {row['reason']}"])
            continue
        rows.append(
            [
                name, row["direction"], f"{row['tokens']:,}", gb_s(row["bytes_per_s"]),
                percent(row["share_of_memcpy"]), gb_s(row["bytes_per_s_both"]),
                percent(row["interference"]),
                {True: "exact", False: "DAMAGED", None: ""}[exact],
            ]
        )  # fmt: skip
    headings = (
        "way", "direction", "tokens", "GB/s", "of memcpy", "GB/s, both ways at once",
        "a pass beside it is longer by", "bytes",
    )  # fmt: skip
    alone = f"A forward pass alone: {ms(result['pass_alone_s'])} ms. Bytes are those of the pool."
    return [*table(headings, rows), "", alone]


def order(result: Mapping[str, Any]) -> list[str]:
    well = ", ".join(f"{n} on the path {path}" for path, n in result["histories"].items())
    lines = [f"Histories in which nothing was wrong: {well}.", ""]
    seen = [
        [what, "not within its time" if n is None else str(n)]
        for what, n in result["left_out"].items()
    ]
    return lines + table(("left out", "seen after so many histories"), seen)


def answers(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, found in result.items():
        if not name.endswith("_compared"):
            continue
        equal = ", ".join(f"{state} {n}" for state, n in found["equal"].items())
        agreed = ", ".join(f"{what} {share:.2f}" for what, share in found["agreement"].items())
        wrong = "; ".join(found["wrong"])
        rows.append([name.removesuffix("_compared"), equal, agreed, wrong or "nothing"])
    starts = ", ".join(f"{name} {s:.0f} s" for name, s in result["start_s"].items())
    lines = table(("system", "equal to plain SGLang's", "together", "wrong"), rows)
    lines += ["", f"Starts: {starts}."]
    return lines + [f"{name} did not start: {why}" for name, why in result["failed"].items()]


def compiled(result: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, found["state"], f"{found['seconds']:.0f}"]
        for name, found in result["modules"].items()
    ]
    lines = table(("module", "state", "seconds"), rows)
    return lines + [f"{name} is not built: {why}" for name, why in result["failed"].items()]


def mixing(result: Mapping[str, Any]) -> list[str]:
    names = ("tpot_s", "gap_p99_s", "gap_most_s", "ttft_s")
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    rows = [
        [
            mode,
            *(
                ms(statistics.median(row[name] for row in result["rows"] if row["mode"] == mode))
                for name in names
            ),
        ]
        for mode in modes
    ]
    return table(("mode", "TPOT, ms", "p99 gap, ms", "longest gap, ms", "TTFT, ms"), rows)


def gpu_tests(result: Mapping[str, Any]) -> list[str]:
    return table(
        ("tests", "outcome"),
        [
            [name, ", ".join(f"{n} {what}" for what, n in found.items() if what != "code")]
            for name, found in result.items()
        ],
    )


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


def ttft(result: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(sample["system"] for sample in result["samples"]))
    tokens = sorted({sample["tokens"] for sample in result["samples"]})
    rows = []
    for n in tokens:
        for state in (FRESH, DEVICE, HOST, DISK):
            cells = [cell(result, name, state, n) for name in names]
            if any(cells):
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
    if "interference" in result:
        longer = percent(result["interference"]["longer_by"])
        lines += ["", f"While pages are written a token takes {longer} longer."]
    if "gave_up" in result:
        lines += ["", f"Not all of it: {result['gave_up']}"]
    return lines


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
    lines = [
        *copy_targets(results.get("copies", {}).get("result")),
        *first_token_targets(results),
        *cascade_targets(results),
    ]
    return lines or ["Nothing was measured that they speak of."]


def copy_targets(moved: Mapping[str, Any] | None) -> list[str]:
    """Of the way that `--tiered-kv-copy-path auto` takes: the faster of ours."""
    lines = []
    rows = [r for r in (moved or {}).get("rows", ()) if r["mover"] in ("ours, dma", "ours, kernel")]
    for direction in ("to device", "to host"):
        found = [r for r in rows if r["direction"] == direction and r["interference"] is not None]
        if not found:
            continue
        best = max(found, key=lambda r: r["bytes_per_s"])
        share, felt = best["share_of_memcpy"], best["interference"]
        name = f"{direction}, {best['tokens']:,} tokens, {best['mover']}"
        lines.append(verdict(f"{name}: share of memcpy", share, share >= MEMCPY_SHARE_MIN, 0.9))
        lines.append(
            verdict(f"{name}: interference, unlimited", felt, felt <= INTERFERENCE_MAX, 0.03)
        )
    return lines


def first_token_targets(results: Results) -> list[str]:
    plain, ours, theirs = (
        results.get(f"ttft_{name}", {}).get("result") or {"samples": []}
        for name in ("plain", "tiered", "hicache")
    )
    lines = []
    for n in sorted({sample["tokens"] for sample in ours["samples"]}):
        host, fresh = ttft_s(ours, "tiered", HOST, n), ttft_s(plain, "plain", FRESH, n)
        if host is not None and fresh is not None and n >= HOST_TARGET_TOKENS:
            share = host / fresh
            is_met = share <= HOST_SHARE_OF_RECOMPUTE_MAX
            lines.append(verdict(f"{n:,} tokens from host: share of recompute", share, is_met, 0.2))
        hicache = ttft_s(theirs, "hicache", HOST, n)
        if host is not None and hicache is not None:
            share = host / hicache
            lines.append(
                verdict(f"{n:,} tokens from host: share of HiCache's", share, share <= 1, 1)
            )
    if "interference" in ours:
        felt = ours["interference"]["longer_by"]
        name = "a token while pages are written: longer by"
        lines.append(verdict(name, felt, felt <= INTERFERENCE_MAX, INTERFERENCE_MAX))
    return lines


def cascade_targets(results: Results) -> list[str]:
    lines = []
    wanted = (CASCADE_ROWS, CASCADE_SHARED)
    for row in (results.get("cascade_kernel", {}).get("result") or {}).get("rows", ()):
        if (row["rows"], row["shared"]) == wanted:
            share = row["part_of_bytes"]
            name = "cascade, 8k x 64: kernel's part of what bytes allow"
            lines.append(verdict(name, share, share >= OF_BYTES_MIN, OF_BYTES_MIN))
    rows = (results.get("cascade_server", {}).get("result") or {}).get("rows", ())
    for row in rows:
        if (row["rows"], row["shared"]) == wanted:
            gain = row["off_by_on"]
            lines.append(
                verdict("cascade, 8k x 64: tokens sooner by", gain, gain >= TPOT_GAIN_MIN, 1.5)
            )
    if rows:
        least = min(row["off_by_on"] for row in rows)
        lines.append(verdict("least gain of an iteration by cascade", least, least >= 1, 1))
    return lines


def verdict(what: str, found: float, is_met: bool, wanted: float) -> str:
    return f"- {'met' if is_met else 'MISSED'}: {what} {found:.3f} (target {wanted:g})"


SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "environment": environment,
    "kernels": kernels,
    "copies": copies,
    "order": order,
    "compiled": compiled,
    "answers": answers,
    "answers_more": answers,
    "ttft_plain": ttft,
    "ttft_tiered": ttft,
    "ttft_hicache": ttft,
    "cascade_kernel": cascade,
    "cascade_server": cascade_server,
    "mixing": mixing,
    "gpu_tests": gpu_tests,
    "hicache_copies": copies,
    "kernels_more": kernels,
    "ttft_more": ttft,
}
