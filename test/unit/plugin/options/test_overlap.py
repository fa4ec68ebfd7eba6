"""The options of overlap: what they accept, what they mean by device, and the files they name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import overlap as overlap_options
from tiered_kv.plugin.options.overlap import budget_share, rank_trace_file


@pytest.mark.parametrize(
    ("value", "on_gpu", "on_cpu"),
    [
        (None, 0.03, None),
        ("auto", 0.03, None),
        ("off", None, None),
        (False, None, None),
        ("5", 0.05, 0.05),
        ("0.5%", 0.005, 0.005),
        (7, 0.07, 0.07),
    ],
)
def test_the_budget_by_device(value: Any, on_gpu: float | None, on_cpu: float | None) -> None:
    text = overlap_options.write_back_budget("--budget", value)
    args = SimpleNamespace(tiered_kv_write_back_budget=text)
    assert budget_share(args, on_cpu=False) == on_gpu
    assert budget_share(args, on_cpu=True) == on_cpu


@pytest.mark.parametrize("value", ["0", "-3", "101", "nan", "much", True, ""])
def test_no_budget(value: Any) -> None:
    with pytest.raises(ConfigError, match="--budget must be a number of percent"):
        overlap_options.write_back_budget("--budget", value)


def test_copy_paths() -> None:
    assert overlap_options.copy_path("--path", None) == "auto"
    assert overlap_options.copy_path("--path", " DMA ") == "dma"
    with pytest.raises(ConfigError, match="--path must be one of auto, dma, kernel"):
        overlap_options.copy_path("--path", "gds")


def test_every_rank_has_a_file_of_its_own(tmp_path: Path) -> None:
    text = overlap_options.trace_file("--trace", str(tmp_path / "trace.json"))
    args = SimpleNamespace(tiered_kv_trace_file=text)
    assert rank_trace_file(args, 0) == tmp_path / "trace.json"
    assert rank_trace_file(args, 2) == tmp_path / "trace-rank2.json"
    args.tiered_kv_trace_file = overlap_options.trace_file("--trace", None)
    assert rank_trace_file(args, 0) is None


@pytest.mark.parametrize("name", [".", "nowhere/trace.json"])
def test_a_file_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--trace cannot be"):
        overlap_options.trace_file("--trace", str(tmp_path / name))
