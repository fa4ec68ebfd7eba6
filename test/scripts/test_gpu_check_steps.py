"""gpu_check's steps with servers, played on stand-ins that answer at once: what they write down,
what the report makes of it, and that what goes wrong costs nothing that was known before.

The real servers are in test_gpu_check.py, -m long.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.gpu import answers, answers_more, mixing, record, report, systems, ttft
from benchmark.gpu.setting import Setting
from benchmark.simulation.probe import Answer
from harness.server import ServerError


class Standin:
    """A server that says what a prompt comes to, and that its prefix was where it is wanted."""

    dies_at: str | None = None
    """The name of the one whose answers break off."""
    slow_disk = False
    tier = ""

    def __init__(self, name: str, args: Sequence[str]) -> None:
        self.name, self.args = name, list(args)
        self.url, self.start_seconds = f"http://{name}", 1.0
        self.is_up = False

    def launch(self) -> None:
        self.is_up = True

    def wait_until_up(self) -> None:
        assert self.is_up

    def kill_9(self) -> None:
        self.is_up = False

    def trouble(self) -> list[str]:
        return ["ERROR: a thread was late"] if self.name == "tiered" else []

    def log_text(self) -> str:
        return "Capture decode CUDA graph end. elapsed=2.50 s, mem usage=0.30 GB"


class StandinProbe:
    def __init__(self, url: str, seed: int = 0) -> None:
        self.n = seed * 1000

    def tokens(self, n: int) -> list[int]:
        self.n += 1
        return [self.n] * n

    def ask(self, prompt: Sequence[int], n_new: int = 1) -> Answer:
        times = [10.0 + 0.01 * i for i in range(n_new)]
        return Answer(9.5, times, len(prompt) - 1, {Standin.tier or "device": len(prompt) - 1})


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    def server_of(step: str, name: str, *rest: Any) -> Standin:
        return Standin(name, rest[2])

    def ask(server: Standin, prompt: Sequence[int], n_new: int) -> Any:
        assert server.is_up
        if server.name == Standin.dies_at:
            raise ServerError(f"{server.name} is gone\nand this is its log")
        first = zlib.crc32(bytes(str(prompt), "ascii"))
        return [first + i for i in range(n_new)], {Standin.tier: len(prompt)}

    def ask_states(server: Any, questions: Any, states: Sequence[str], found: Any) -> Any:
        for state in states:
            monkeypatch.setattr(Standin, "tier", answers.TIERS.get(state, ""))
            yield from original([server, questions, [state], found])

    def original(arguments: list[Any]) -> Any:
        return real(*arguments)

    def flush(server: Standin) -> None:
        if Standin.slow_disk:
            raise ServerError("the pages did not reach the disk within 60 s\nand this is its log")

    real = answers.ask_states
    for module in (answers, answers_more):
        monkeypatch.setattr(module, "ask_states", ask_states)
    monkeypatch.setattr(answers, "ask", ask)
    for module in (answers, ttft):
        monkeypatch.setattr(module, "flush", flush)
        monkeypatch.setattr(module, "wait_for_disk", lambda *_, **__: 0.0)
    for module in (ttft, mixing):
        monkeypatch.setattr(module, "Probe", StandinProbe)
    monkeypatch.setattr(mixing, "SMALL", mixing.Load(2, 32, 24, 3, 64, 0.0, 1))
    monkeypatch.setattr(systems, "server_of", server_of)
    return Setting(torch.device("cpu"), True, tmp_path)


def play(setting: Setting, step: str, measure: Any) -> dict[str, Any]:
    """What the file of a step holds, as it was brought home."""
    notes = record.Record(setting.folder / f"{step}.json", step, "cpu", True)
    try:
        notes.write(record.DONE, result=measure(setting, notes))
    except RuntimeError as error:
        (setting.folder / f"{step}.log").write_text(str(error))
    document = json.loads((setting.folder / f"{step}.json").read_text())
    assert not list(setting.folder.glob("*_disk"))
    found: dict[str, Any] = document
    return found


def written(setting: Setting, step: str) -> str:
    document = record.read(setting.folder / f"{step}.json")
    assert document is not None
    text = report.report({step: document})
    assert "makes no table" not in text
    return text.split(f"## {step}\n")[1].split("## targets")[0]


def test_answers_and_more(setting: Setting) -> None:
    document = play(setting, "answers", answers.measure)
    assert document["state"] == record.DONE
    found = document["result"]
    assert found["tiered_compared"]["equal"] == dict.fromkeys(answers.STATES, "2 of 2")
    assert found["trouble"] == {"tiered": ["ERROR: a thread was late"]}
    assert found["captures"]["plain"] == [{"what": "decode", "seconds": 2.5, "gb": 0.3}]
    text = written(setting, "answers")
    assert (
        "| tiered | new 2 of 2, again 2 of 2, after others 2 of 2, after a flush 2 of 2 |" in text
    )
    assert "The log of tiered tells of trouble: ERROR: a thread was late" in text
    more = play(setting, "answers_more", answers_more.measure)
    assert more["state"] == record.DONE
    assert more["result"]["wrong"] == {"cascade": [], "make_way": []}
    written(setting, "answers_more")


def test_one_that_dies_keeps_nobody_from_being_asked(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(setting, "answers", answers.measure)
    monkeypatch.setattr(Standin, "dies_at", "cascade")
    document = play(setting, "answers_more", answers_more.measure)
    assert document["state"] == record.RUNNING  # and is closed as failed by whoever started it
    wrong = document["result"]["wrong"]
    assert wrong == {"cascade": ["did not answer: cascade is gone"], "make_way": []}


@pytest.mark.parametrize("name", ["plain", "tiered", "hicache"])
def test_first_tokens(setting: Setting, name: str) -> None:
    step = f"ttft_{name}"
    document = play(setting, step, getattr(ttft, name))
    assert document["state"] == record.DONE
    samples = document["result"]["samples"]
    states = list(dict.fromkeys(sample["state"] for sample in samples))
    assert states == [ttft.FRESH, ttft.DEVICE, ttft.HOST, ttft.DISK]
    assert document["result"]["decoding"][name]["tpot_s"] == pytest.approx(0.01)
    assert ("interference" in document["result"]) == (name == "tiered")
    assert f"| {name}, 2 at once | 10 |" in written(setting, step)


def test_a_slow_disk_costs_what_comes_from_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Standin, "slow_disk", True)
    document = play(setting, "ttft_tiered", ttft.tiered)
    assert document["state"] == record.DONE
    found = document["result"]
    assert {sample["state"] for sample in found["samples"]} == {ttft.FRESH, ttft.DEVICE, ttft.HOST}
    assert found["decoding"]["tiered"]["n_decodes"] == 2
    assert found["gave_up"] == "the pages did not reach the disk within 60 s"
    assert "Not all of it: the pages did not reach" in written(setting, "ttft_tiered")


def test_mixed_and_in_turns(setting: Setting) -> None:
    document = play(setting, "mixing", mixing.measure)
    assert document["state"] == record.DONE
    rows = document["result"]["rows"]
    assert [row["mode"] for row in rows] == ["in turns", "mixed"]
    assert all(row["tpot_s"] == pytest.approx(0.01) for row in rows)
    assert "| in turns | 10 | 10 | 10 | 500 |" in written(setting, "mixing")
