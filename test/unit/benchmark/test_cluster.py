"""What the benchmark of a cluster counts, on made-up workers behind the real gateway."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from benchmark.serving.cluster import TIERS, Conversation, Turn, report, row
from harness.gateway import Gateway
from harness.stub_workers import StubWorker


def test_a_cut_stream_is_asked_again_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        StubWorker("a") as a,
        StubWorker("b") as b,
        Gateway([a.url, b.url], tmp_path / "log") as gateway,
    ):
        gateway.wait_healthy({a.url, b.url}, 20)
        talk = Conversation("talk", first_sentences=3, extra={"tokens_after_s": 1.5})

        def kill_who_answers() -> None:
            (b if b.received() else a).kill_9()

        threading.Timer(0.7, kill_who_answers).start()
        turn = talk.turn(gateway, 0)
        assert (turn.n_cut, turn.error) == (1, "")
        assert turn.cached == {"device": 1, "host": 0, "disk": 0, "store": 1}
        assert turn.ttft_s > 0.7
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]
        a.kill_9()
        b.kill_9()
        assert talk.turn(gateway, 1).error


def test_a_row_has_shares_of_what_was_answered() -> None:
    cached = dict.fromkeys(TIERS, 0)
    turns = [
        vars(Turn(4, 100, {**cached, "host": 50, "store": 25}, 1.0, 0)),
        vars(Turn(4, 100, {**cached, "store": 25}, 3.0, 1)),
        vars(Turn(4, 0, {}, 0.0, 0, "refused")),
    ]
    expected = "| 5 | a new worker | 0% | 25% | 0% | 25% | 50% | 2.00 | 3.00 | 1 | 1 |"
    assert row(4, turns) == expected
    setting = {"conversations": 3, "concurrency": 1, "load_policy": "cost"}
    setting |= {"device_tokens": 4096, "host_tokens": 4096}
    text = report({"machine": "a machine", "setting": setting, "variants": {"none": turns}})
    assert expected in text
    assert "## With no shared store" in text
