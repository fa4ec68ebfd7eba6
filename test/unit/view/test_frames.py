"""Rates and history from what a server counts, and servers that go and come back."""

from __future__ import annotations

import copy
from typing import Any

from support_view.recorded import NOWHERE
from tiered_kv.view.frames import HISTORY_MAX, Frames


def snapshot(at_s: float, moved: int = 0, **hits: int) -> dict[str, Any]:
    """At that time, after so many bytes from the device to the host, and those hits."""
    made = copy.deepcopy(NOWHERE)
    made["at_s"] = at_s
    edge = {"source": "device", "target": "host", "queued_bytes": 0, "transfers": 0}
    made["edges"] = [{**edge, "moved_bytes": moved}]
    made["hits"].update(hits)
    return made


def test_the_first_has_no_rates() -> None:
    frame = Frames().seen(snapshot(10.0, 5_000_000, requests=7, prompt_tokens=900, host=100))
    assert frame["state"] == "live"
    assert frame["edges"][0]["bytes_per_s"] == 0
    assert frame["point"]["host"] == frame["point"]["computed"] == 0


def test_rates_are_since_the_one_before() -> None:
    frames = Frames()
    frames.seen(snapshot(10.0, 1000, requests=1, prompt_tokens=100, device=60))
    frame = frames.seen(snapshot(12.0, 5000, requests=2, prompt_tokens=400, device=90, disk=70))
    assert frame["edges"][0]["bytes_per_s"] == 2000
    point = frame["point"]
    assert (point["device"], point["host"], point["disk"]) == (30, 0, 70)
    assert point["computed"] == 200
    assert len(frames.history) == 2


def test_a_server_that_goes_and_comes_back_as_another() -> None:
    frames = Frames()
    frames.seen(snapshot(10.0, 9000, requests=50, prompt_tokens=4000))
    lost = frames.lost("No server answers.", 11.0)
    assert (lost["state"], lost["since_s"], lost["edges"]) == ("disconnected", 11.0, [])
    assert lost["snapshot"]["at_s"] == 10.0
    assert frames.lost("Still none.", 15.0)["since_s"] == 11.0
    back = frames.seen(snapshot(20.0, 100, requests=1, prompt_tokens=30))
    assert back["state"] == "live"
    assert back["edges"][0]["bytes_per_s"] == 0
    assert frames.history == [back["point"]]
    assert frames.lost("Gone again.", 30.0)["since_s"] == 30.0


def test_before_anything_was_seen() -> None:
    frame = Frames().lost("No server answers.", 1.0)
    assert frame["snapshot"] is None


def test_history_is_bounded() -> None:
    frames = Frames()
    for at in range(HISTORY_MAX + 50):
        frames.seen(snapshot(float(at), at, requests=at))
    assert len(frames.history) == HISTORY_MAX
