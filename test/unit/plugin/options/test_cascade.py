"""`--tiered-kv-cascade`: its values, and what it does not go with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins

from support.tiny_llama import write_config
from support_plugin import on_release
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import cascade as cascade_option

ON_GPUS = cascade_option.BACKENDS.get("cuda", "torch_native")


def server_args(mode: str, **fields: Any) -> Any:
    device = fields.get("device", "cpu")
    backend = fields.pop("backend", cascade_option.BACKENDS.get(device))
    values = {
        "tiered_kv": True,
        "tiered_kv_cascade": mode,
        "model_path": "model",
        "device": "cpu",
        "enable_deterministic_inference": False,
        "speculative_algorithm": None,
        "enable_dp_attention": False,
        "attn_dp_size": 1,
        "enable_torch_compile": False,
        "pp_size": 1,
        **on_release.attention_backends(backend),
    }
    return SimpleNamespace(**values | fields)


@pytest.mark.parametrize(
    ("value", "mode"),
    [(None, "auto"), (True, "on"), (False, "off"), (" ON ", "on"), ("auto", "auto")],
)
def test_values(value: Any, mode: str) -> None:
    assert cascade_option.cascade_mode(value) == mode


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of auto, on, off, not 'maybe'"):
        cascade_option.cascade_mode("maybe")


@pytest.mark.parametrize(
    ("mode", "device", "wanted"),
    [
        ("auto", "cpu", True),
        ("auto", "cuda", False),
        pytest.param("on", "cuda", True, marks=on_release.reads_shared_kv_on_gpus),
        ("off", "cpu", False),
    ],
)
def test_auto_is_where_it_was_measured(mode: str, device: str, wanted: bool) -> None:
    args = server_args(mode, device=device)
    assert cascade_option.is_wanted(args) is wanted
    cascade_option.check_resolved(args)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device": "cuda", "backend": "fa3"}, f"backend fa3, only with {ON_GPUS}"),
        ({"backend": "intel_amx"}, "backend intel_amx, only with torch_native"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ],
)
def test_what_it_does_not_go_with(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cascade_option.check_resolved(server_args("on", **fields))
    for mode in ("auto", "on"):
        assert not cascade_option.is_wanted(server_args(mode, **fields))
    cascade_option.check_resolved(server_args("auto", **fields))


def test_nothing_without_the_flag() -> None:
    assert not cascade_option.is_wanted(server_args("on", tiered_kv=False))
    assert not cascade_option.is_wanted(None)


# -- the command line --------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a Llama's configuration and no weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_config(tmp_path)


def parse(model: str, *argv: str) -> Any:
    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    return on_release.resolve(
        prepare_server_args(["--model-path", model, "--device", "cpu", *argv])
    )


@pytest.mark.parametrize(
    ("argv", "mode", "wanted"),
    [
        (["--tiered-kv"], "auto", True),
        (["--tiered-kv", "--tiered-kv-cascade", "ON"], "on", True),
        (["--tiered-kv", "--tiered-kv-cascade", "off"], "off", False),
        ([], "auto", False),
    ],
)
def test_resolved(model: str, argv: list[str], mode: str, wanted: bool) -> None:
    args = parse(model, *argv)
    assert args.tiered_kv_cascade == mode
    assert cascade_option.is_wanted(args) is wanted


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tiered-kv", "--tiered-kv-cascade", "sometimes"], "must be one of auto, on, off"),
        (["--tiered-kv-cascade", "on"], "--tiered-kv-cascade has no effect without --tiered-kv"),
        (
            ["--tiered-kv", "--tiered-kv-cascade", "on", "--enable-torch-compile"],
            "--tiered-kv-cascade on does not go with --enable-torch-compile",
        ),
    ],
)
def test_refused(
    model: str, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(model, *argv)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
