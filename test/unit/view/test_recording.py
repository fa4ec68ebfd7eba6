"""Recordings: written, read again, cut short, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from support_view.recorded import NOWHERE
from tiered_kv.core.errors import ConfigError
from tiered_kv.view.recording import Line, Recorder, read_recording

LINES = [Line(1.0, NOWHERE), Line(2.0, None, "No server answers."), Line(3.0, NOWHERE)]


def written(path: Path) -> Path:
    recorder = Recorder(path)
    for line in LINES:
        recorder.add(line)
    recorder.close()
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name)
    assert read_recording(path) == LINES
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("name", "least"), [("r.jsonl", 2), ("r.jsonl.gz", 1)])
def test_one_that_is_cut_short(tmp_path: Path, name: str, least: int) -> None:
    path = written(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    found = read_recording(path)
    assert least <= len(found) <= 3
    assert found == LINES[: len(found)]


@pytest.mark.parametrize(
    "text", ["", "{}", "not json", '{"tiered_kv_recording": 99}\n{"at_s": 1}', "[1]\n[2]"]
)
def test_what_is_no_recording(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no recording"):
        read_recording(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recording(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recording(written(tmp_path / "plain").rename(tmp_path / "plain.gz"))
    with pytest.raises(ConfigError, match="cannot be written"):
        Recorder(tmp_path / "nowhere" / "r.jsonl")
