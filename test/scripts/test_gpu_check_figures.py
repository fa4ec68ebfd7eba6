"""What scripts/gpu_check makes of its figures: tables, targets, what is right and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch

from benchmark.gpu import answers, compiled, environment, report, systems, ttft
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer
from harness.server import ServerError

# -- what is made of the figures --------------------------------------------------------------

SAMPLE = {"state": ttft.HOST, "tokens": 32768, "cached_tokens": 32704, "by_tier": {"host": 1}}


def served(host_s: float, hicache_s: float, fresh_s: float) -> dict[str, Any]:
    times = {
        "tiered": (ttft.HOST, host_s), "hicache": (ttft.HOST, hicache_s),
        "plain": (ttft.FRESH, fresh_s),
    }  # fmt: skip
    return {
        f"ttft_{system}": {
            "is_small": False,
            "state": "done",
            "result": {
                "samples": [{**SAMPLE, "system": system, "state": state, "ttft_s": seconds}],
                "decoding": {},
            },
        }
        for system, (state, seconds) in times.items()
    }


@pytest.mark.parametrize(
    ("times", "verdicts"),
    [((0.1, 0.2, 1.0), ["met", "met"]), ((0.3, 0.2, 1.0), ["MISSED", "MISSED"])],
)
def test_targets_are_judged_by_what_was_measured(
    times: tuple[float, float, float], verdicts: list[str]
) -> None:
    lines = report.targets(served(*times))
    assert [line.split(":")[0].removeprefix("- ") for line in lines] == verdicts


def test_copies_are_judged_by_the_way_that_auto_takes() -> None:
    def row(mover: str, direction: str, speed: float, share: float, felt: float) -> dict[str, Any]:
        return {
            "mover": mover, "direction": direction, "tokens": 16384, "bytes_per_s": speed,
            "share_of_memcpy": share, "interference": felt,
        }  # fmt: skip

    rows = [
        row("ours, dma", "to device", 50e9, 0.92, 0.01),
        row("ours, kernel", "to device", 40e9, 0.73, 0.2),
        row("ours, dma", "to host", 30e9, 0.5, 0.05),
    ]
    lines = report.targets({"copies": {"is_small": False, "result": {"rows": rows}}})
    assert [line.split(":")[0] for line in lines] == ["- met", "- met", "- MISSED", "- MISSED"]


def test_cascade_must_gain_what_its_bytes_allow_and_never_be_slower() -> None:
    kernel = [{"rows": 64, "shared": 8192, "part_of_bytes": 0.7}]
    servers = [
        {"rows": 64, "shared": 8192, "off_by_on": 1.6},
        {"rows": 16, "shared": 1024, "off_by_on": 0.97},
    ]
    found = {
        "cascade_kernel": {"is_small": False, "result": {"rows": kernel}},
        "cascade_server": {"is_small": False, "result": {"rows": servers}},
    }
    lines = report.targets(found)
    assert [line.split(":")[0] for line in lines] == ["- MISSED", "- met", "- MISSED"]
    assert "least gain of an iteration by cascade 0.970" in lines[-1]


def test_a_table_of_what_a_step_had_come_to() -> None:
    found = served(0.1, 0.2, 1.0)
    found["ttft_hicache"]["state"] = "out of time"
    found["ttft_hicache"]["reason"] = "stopped after 100 s: the log's last line"
    found["copies"] = {"is_small": False, "state": "failed", "result": {}, "reason": "x"}
    found["kernels"] = {"is_small": False, "state": "failed", "result": {"rows": []}}
    text = report.report(found)
    assert "| 32,768 | after others | 200 (host 1) |" in text
    assert "Not all of it: stopped after 100 s" in text
    assert "makes no table yet" in text


def test_the_most_that_pcie_can_carry() -> None:
    smi = {"pcie.link.gen.max": "5", "pcie.link.width.max": "16"}
    assert environment.pcie_peak_bytes_s(smi) == pytest.approx(63.0e9, rel=1e-3)
    assert environment.pcie_peak_bytes_s({**smi, "pcie.link.gen.max": "[N/A]"}) is None
    assert environment.pcie_peak_bytes_s({}) is None


def test_the_dummy_model_is_llama_8b(tmp_path: Path) -> None:
    from tiered_kv.core.model_spec import ModelSpec, find_model

    folder = systems.write_model(tmp_path / "model", is_small=False)
    config = json.loads((folder / "config.json").read_text())
    model, known = ModelSpec.from_hf_config(config, name="x"), find_model("Llama-3.1-8B")
    assert model.n_parameters == known.n_parameters
    assert model.kv_bytes_per_token == known.kv_bytes_per_token
    assert model.kv_bytes_per_token == ttft.LARGE_SIZES.token_bytes == answers.LARGE.token_bytes


# -- kernels that servers compile ---------------------------------------------------------------


def test_what_cannot_be_built_is_named_and_all_else_is_there(tmp_path: Path) -> None:
    """As on a machine without nvcc that was brought one module of three."""

    def spec(name: str, *, is_aot: bool, error: Exception | None = None) -> tuple[str, Any]:
        def build_and_load() -> None:
            if error is not None:
                raise error

        return name, lambda: SimpleNamespace(is_aot=is_aot, build_and_load=build_and_load)

    no_compiler = RuntimeError("Could not find nvcc\nand a long command")
    specs = [
        spec("cascade", is_aot=True), spec("decode", is_aot=False),
        spec("prefill", is_aot=False, error=no_compiler),
    ]  # fmt: skip
    setting = Setting(torch.device("cuda"), False, tmp_path)
    made = {m.name: m for m in compiled.all_made(setting, specs, [("rope", lambda: None)])}
    assert {name: m.state for name, m in made.items() if m.failed is None} == {
        "cascade": "brought", "decode": "built", "rope": "loaded",
    }  # fmt: skip
    assert made["prefill"].failed == "RuntimeError: Could not find nvcc"
    # Without a GPU it is only said what is there.
    setting = Setting(torch.device("cpu"), True, tmp_path)
    made = {m.name: m for m in compiled.all_made(setting, specs, [("rope", lambda: None)])}
    assert {name: m.state for name, m in made.items()} == {
        "cascade": "brought", "decode": "missing", "prefill": "missing",
    }  # fmt: skip


# -- answers ----------------------------------------------------------------------------------

PLAIN = {
    "tokens": {answers.FRESH: [[1, 2, 3], [4, 5, 6]], answers.DEVICE: [[1, 2, 4], [4, 5, 6]]},
    "gang": [[1, 2, 3, 4]], "gang_alone": [[1, 2, 3, 5]], "strangers": [[9, 9, 9, 9]],
}  # fmt: skip


def said(**changes: Any) -> answers.Answers:
    cached = {state: [{tier: 16}] * 2 for state, tier in answers.TIERS.items()}
    again = PLAIN["tokens"][answers.DEVICE]
    tokens = dict.fromkeys(answers.STATES[1:], again)
    found = answers.Answers(
        tokens={answers.FRESH: PLAIN["tokens"][answers.FRESH], **tokens},
        by_tier={answers.FRESH: [{}, {}], **cached},
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_answers_that_are_equal_are_right() -> None:
    found = answers.compared(said(gang=[[1, 2, 8, 8]], strangers=[[9, 9, 9, 9]]), PLAIN)
    assert found["wrong"] == []
    assert found["equal"][answers.HOST] == "2 of 2"
    # Half of what plain SGLang agrees with itself, alone and together.
    assert found["agreement"]["gang"] == 0.5
    assert found["noise"] == 0.25


def test_what_is_wrong_with_answers_is_said() -> None:
    other = said()
    other.tokens[answers.HOST] = [[7, 2, 4], [4, 5, 6]]
    other.by_tier[answers.DISK] = [{"storage": 16}, {"host": 16}]
    other.gang = [[8, 2, 3, 4]]
    wrong = answers.compared(other, PLAIN)["wrong"]
    assert len(wrong) == 3
    assert wrong[0] == "1 answers differ, after others"
    assert wrong[1] == "after a flush: not all came from the storage"
    assert wrong[2].startswith("gang: 0.00 of the answers agree")
    with pytest.raises(RuntimeError, match="tiered: 1 answers differ"):
        answers.check({"wrong": {"tiered": wrong}, "failed": {}})


def test_a_model_whose_answers_depend_on_nothing_says_nothing() -> None:
    assert answers.depends_on_prefix(answers.Answers(tokens={answers.DEVICE: [[1], [2]]}))
    assert not answers.depends_on_prefix(answers.Answers(tokens={answers.DEVICE: [[1], [1]]}))
    with pytest.raises(RuntimeError, match="do not depend on the prefix"):
        answers.check({"wrong": {}, "failed": {}, "depends_on_prefix": False})


def test_a_server_that_does_not_answer_is_what_is_wrong_with_it() -> None:
    result: dict[str, Any] = {"wrong": {}, "failed": {}}
    for name, error in (
        ("first", requests.ConnectionError("refused")), ("second", ServerError("busy\nits log")),
    ):  # fmt: skip
        with answers.gives_up(name, result):
            raise error
    assert result["wrong"] == {
        "first": ["did not answer: refused"], "second": ["did not answer: busy"],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="first: did not answer"):
        answers.check(result)
    with pytest.raises(KeyError), answers.gives_up("third", result):
        raise KeyError("a fault of the check")


def test_a_system_of_other_shapes_is_compared_with_its_own_device() -> None:
    """Without graphs passes are not padded: each answer may go another way, and does so again."""
    other = said()
    own = [[1, 2, 9], [4, 5, 7]]
    other.tokens = {answers.FRESH: own, **dict.fromkeys(answers.STATES[1:], own)}
    found = answers.compared(other, PLAIN, rounds_alike=False)
    assert found["wrong"] == []
    assert found["equal"] == {answers.HOST: "2 of 2", answers.DISK: "2 of 2"}
    other.tokens[answers.DISK] = [[1, 2, 9], [4, 5, 8]]
    other.tokens[answers.DEVICE] = [[7, 2, 9], [8, 5, 7]]
    wrong = answers.compared(other, PLAIN, rounds_alike=False)["wrong"]
    assert [what.split(":")[0] for what in wrong] == [
        "again", "2 answers differ, after others", "2 answers differ, after a flush",
    ]  # fmt: skip


# -- first tokens -----------------------------------------------------------------------------


class ThreeTiers:
    """A server's cache: tokens of each prompt on the device, least recently asked first to go."""

    def __init__(self, sizes: ttft.Sizes) -> None:
        self.sizes = sizes
        self.device: dict[int, int] = {}
        self.host: dict[int, int] = {}
        self.disk: dict[int, int] = {}
        self.n_computed = 0

    def tokens(self, n: int) -> list[int]:
        self.n_prompts = getattr(self, "n_prompts", 0) + 1
        return [self.n_prompts] * n

    def ask(self, prompt: list[int], n_new: int = 1) -> Answer:
        name, n_tokens = prompt[0], len(prompt)
        found = {"device": self.device.pop(name, 0)}
        for tier, held in (("host", self.host), ("storage", self.disk)):
            found[tier] = max(0, held.get(name, 0) - sum(found.values()))
        cached = sum(found.values())
        self.n_computed += n_tokens - cached
        self.device[name] = self.host[name] = self.disk[name] = n_tokens - 1
        for other in list(self.device):
            surplus = sum(self.device.values()) - self.sizes.device_tokens
            self.device[other] -= min(max(surplus, 0), self.device[other])
        assert sum(self.host.values()) <= self.sizes.host_tokens
        return Answer(0.0, [1.0], cached, found)

    def flush(self, _server: object) -> None:
        self.device.clear()
        self.host.clear()


@pytest.mark.parametrize("sizes", [ttft.LARGE_SIZES, ttft.SMALL_SIZES])
def test_prompts_are_where_their_state_says(
    monkeypatch: pytest.MonkeyPatch, sizes: ttft.Sizes
) -> None:
    cache = ThreeTiers(sizes)
    monkeypatch.setattr(ttft, "Probe", lambda _url, seed: cache)
    monkeypatch.setattr(ttft, "flush", cache.flush)
    server = SimpleNamespace(url="")
    questions = ttft.Questions(server, "tiered", sizes)  # type: ignore[arg-type]
    samples = [*questions.computed(), *questions.after_others()]
    for _ in range(sizes.n_decodes):
        cache.ask(cache.tokens(sizes.decode_context + sizes.decode_tokens))
    samples += questions.after_a_flush()
    page = sizes.page_tokens
    tier_of = {ttft.DEVICE: "device", ttft.HOST: "host", ttft.DISK: "storage"}
    for sample in samples:
        if sample.state == ttft.FRESH:
            assert sample.cached_tokens == 0
            continue
        assert sample.by_tier[tier_of[sample.state]] >= sample.tokens - page, sample
    kinds = {(sample.state, sample.tokens) for sample in samples}
    assert len(kinds) == 4 * len(sizes.lengths)
    # What is computed is written: it must fit the disk tier that the server is given.
    n_interfering = ttft.INTERFERENCE_TURNS * sizes.lengths[-2]
    assert (cache.n_computed + n_interfering) * sizes.token_bytes < systems.DISK_BYTES


def test_time_per_token_counts_pieces_of_two_tokens_as_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers that overlap from second 10 on; a token each second, two of them in one piece."""
    times = iter(([8.0, 9.0, 10.0, 11.0, 12.0], [10.0, 12.0, 12.0, 13.0, 14.0]))
    probe = SimpleNamespace(
        tokens=lambda n: [1] * n, ask=lambda _prompt, _n: Answer(0.0, next(times))
    )
    monkeypatch.setattr(ttft, "Probe", lambda _url, seed: probe)
    found = ttft.output_tokens(SimpleNamespace(url=""), ttft.SMALL_SIZES)  # type: ignore[arg-type]
    assert found["tpot_s"] == pytest.approx(1.0)
    assert found["tpot_p99_s"] == 2.0
