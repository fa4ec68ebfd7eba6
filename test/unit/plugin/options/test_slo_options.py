"""A server's own classes: read from a file once, carried as text with the arguments afterwards."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang.srt.plugins import load_plugins  # noqa: E402

from support.tiny_llama import write_config  # noqa: E402
from support_plugin import on_release  # noqa: E402
from tiered_kv.api.slo import DEFAULT_CLASSES, SloClass, SloClasses  # noqa: E402
from tiered_kv.core.errors import ConfigError  # noqa: E402
from tiered_kv.plugin.options.values import slo_table  # noqa: E402

load_plugins()

from tiered_kv.plugin.start.server_args import ServerArgs  # noqa: E402

OPTION = "--tiered-kv-slo-classes"
TABLE = {"chat": {"ttft_ms": 500, "tbt_ms": 50}, "bulk": {"max_wait_ms": 600000}}
CHAT, BULK = SloClass("chat", 0.5, 0.05), SloClass("bulk", max_wait_s=600.0)
TOML = "[chat]\nttft_ms = 500\ntbt_ms = 50\n\n[bulk]\nmax_wait_ms = 600000\n"


def serve(tmp_path: Path, **options: Any) -> ServerArgs:
    return on_release.resolve(
        ServerArgs(
            model_path=write_config(tmp_path),
            device="cuda" if torch.cuda.is_available() else "cpu",
            tiered_kv=True,
            tiered_kv_disk_dir="none",
            **options,
        )
    )


@pytest.mark.parametrize(("name", "text"), [("c.json", json.dumps(TABLE)), ("c.toml", TOML)])
def test_a_file_is_read_once(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    args = serve(tmp_path, tiered_kv_slo_classes=str(file), tiered_kv_default_slo_class="chat")
    file.unlink()
    expected = SloClasses((CHAT, BULK), "chat")
    assert args.slo_classes() == expected
    assert pickle.loads(pickle.dumps(args)).slo_classes() == expected
    assert json.loads(args.tiered_kv_slo_classes) == TABLE


def test_resolving_twice_changes_nothing() -> None:
    line = slo_table(OPTION, json.dumps(TABLE))
    assert slo_table(OPTION, line) == line


def test_without_a_file_the_classes_are_built_in(tmp_path: Path) -> None:
    assert serve(tmp_path).slo_classes() == DEFAULT_CLASSES
    args = serve(tmp_path, tiered_kv_default_slo_class="none")
    assert args.slo_classes() == SloClasses(DEFAULT_CLASSES.classes, None)


@pytest.mark.parametrize("default", ["gold", None])
def test_the_default_must_be_one_of_them(tmp_path: Path, default: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        serve(
            tmp_path,
            tiered_kv_slo_classes=json.dumps(TABLE),
            tiered_kv_default_slo_class=default,
        )
    assert str(error.value) == (
        "--tiered-kv-default-slo-class must name a class, but there is no class "
        f"{default or 'standard'!r}; name one of chat, bulk, or none."
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.json", None, "cannot be read from {}: No such file or directory; name a file."),
        ("latin.json", b"\xff\xfe{", "cannot be read from {}: it is no text; name a file."),
        ("c.json", b"chat: 5", "cannot be {}: it is no JSON (Expecting value"),
        ("c.toml", b"chat = {", "cannot be {}: it is no TOML ("),
        ("c.json", b"[]", "cannot be {}: it must map names of classes to objectives"),
        ("c.json", b'{"a": {"ttft_ms": NaN}}', "cannot be {}: a.ttft_ms must be a number of"),
    ],
)
def test_a_bad_file(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        slo_table(OPTION, str(file))
    message = str(error.value)
    assert message.startswith(f"{OPTION} {words.format(file)}")
    assert message.endswith(".")
    assert "\n" not in message
