"""What the check does, in the order of its worth, and what comes next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: What can be known with torch and Triton alone; whether it serves; how fast it is.
ALONE, SERVES, FIGURES = "alone", "serves", "figures"
GROUPS = (ALONE, SERVES, FIGURES)
#: Takes seconds where a bundle has brought the kernels.
COMPILED = "compiled"
#: Limits are those of a GPU; a CPU rehearses with others, since it starts servers in minutes.
REHEARSAL_LIMIT_S = {ALONE: 90.0, SERVES: 600.0, FIGURES: 600.0}


@dataclass(frozen=True)
class Step:
    """One process. limit_s: its end, whatever it is doing; least_s: with less it is not begun."""

    name: str
    group: str
    limit_s: float
    least_s: float
    function: str
    """`module:function`, called with the setting and the record; modules of this package by their
    last names."""
    tells: str

    def limit(self, *, is_small: bool) -> float:
        return REHEARSAL_LIMIT_S[self.group] if is_small else self.limit_s


STEPS: tuple[Step, ...] = (
    Step("environment", ALONE, 15, 8, "environment:measure",
         "versions, hardware, peaks of plain torch"),
    Step("kernels", ALONE, 30, 15, "kernels:measure",
         "pages gathered, scattered, converted: against references, and in bytes/s"),
    Step("copies", ALONE, 30, 15, "copies:measure",
         "pages to the host and back, by DMA and by kernels: against memcpy, both ways at once, "
         "beside matrix products"),
    Step("order", ALONE, 15, 8, "order:measure",
         "the order checker's histories on the device's own streams"),
    Step(COMPILED, SERVES, 120, 15, "compiled:measure",
         "kernels that servers would compile at their first start: brought, or built now"),
    Step("answers", SERVES, 80, 45, "answers:measure",
         "greedy answers of plain SGLang and of --tiered-kv: prefix on device, host, disk"),
    Step("answers_more", SERVES, 70, 45, "answers_more:measure",
         "the same without CUDA graphs, with cascade attention, with requests that make way"),
    Step("ttft_plain", FIGURES, 70, 45, "ttft:plain",
         "time to first token, plain SGLang: computed and from the device"),
    Step("ttft_tiered", FIGURES, 100, 60, "ttft:tiered",
         "time to first token by tier; time per output token while pages are written"),
    Step("ttft_hicache", FIGURES, 100, 60, "ttft:hicache", "the same with SGLang's HiCache"),
    Step("cascade_kernel", FIGURES, 45, 25, "cascade:kernel",
         "attention of one layer over shared prefixes, in CUDA graphs"),
    Step("cascade_server", FIGURES, 110, 70, "cascade:server",
         "time per output token of real servers over shared prefixes, CUDA graphs on"),
    Step("mixing", FIGURES, 90, 60, "mixing:measure",
         "prompts that arrive while others decode: mixed into one pass, or in turns"),
    Step("gpu_tests", FIGURES, 120, 40, "gpu_tests:measure",
         "this project's tests that need a GPU"),
    Step("hicache_copies", FIGURES, 60, 25, "hicache_copies:measure",
         "HiCache's ways to copy the same pages"),
    Step("kernels_more", FIGURES, 90, 30, "kernels:more",
         "the formats that `kernels` left out, and rows in pinned memory"),
    Step("ttft_more", FIGURES, 120, 60, "ttft:more", "time to first token, plain, 2k to 16k"),
)  # fmt: skip
NAMES = tuple(step.name for step in STEPS)


def next_step(
    states: Mapping[str, str], tried: Sequence[str], left_s: float, steps: Sequence[Step] = STEPS,
    *, is_small: bool = False,
) -> Step | None:  # fmt: skip
    """What to do with `left_s` seconds left: what was never tried, then what is not done.

    states: of the steps that have a file. tried: in this run, which tries nothing twice. What there
    is no time for is passed over for what is shorter.
    """
    open_steps = [
        step for step in steps if states.get(step.name) != "done" and step.name not in tried
    ]
    fresh = [step for step in open_steps if states.get(step.name) in (None, "not here")]
    again = [step for step in open_steps if step not in fresh]
    for step in (*fresh, *again):
        if is_small or step.least_s <= left_s:
            return step
    return None


def seconds_of(text: str) -> float:
    """ "15m", "90s", "540". Raises ValueError."""
    text = text.strip().lower()
    unit = {"h": 3600.0, "m": 60.0, "s": 1.0}.get(text[-1:])
    seconds = float(text if unit is None else text[:-1]) * (unit or 1.0)
    if not 0 < seconds < 1e6:
        raise ValueError(text)
    return seconds
