"""The ServerArgs subclass where SGLang's is a Struct that is resolved later (0.5.23).

Guarantee: what the user gave stays, what was decided is read beside it, a mistake is one sentence
and exit code 2, and whoever unpickles the object is prepared.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from support_plugin import on_release  # noqa: E402

if on_release.IS_0_5_17:
    pytest.skip("a dataclass on 0.5.17: test_server_args.py", allow_module_level=True)

from sglang.srt.plugins import load_plugins  # noqa: E402

from support.tiny_llama import write_config  # noqa: E402
from tiered_kv.core.errors import ConfigError  # noqa: E402

load_plugins()

from sglang.srt import server_args as upstream  # noqa: E402

from tiered_kv.plugin.start import process_carrier  # noqa: E402
from tiered_kv.plugin.start.server_args import ServerArgs  # noqa: E402
from tiered_kv.plugin.upstream.current import arguments  # noqa: E402

STOCK = ServerArgs.__mro__[1]
NOT_COMPARED = {"random_seed", "nccl_port"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_config(tmp_path)


def parse(model: str, *argv: str) -> Any:
    return upstream.prepare_server_args(["--model-path", model, "--device", "cpu", *argv])


def test_ours_is_in_the_place_of_sglangs(model: str) -> None:
    assert upstream.ServerArgs is ServerArgs
    assert issubclass(ServerArgs, STOCK)
    assert isinstance(parse(model), ServerArgs)


def test_what_is_decided_is_read_beside_what_was_given(model: str) -> None:
    args = parse(model, "--tiered-kv", "--tiered-kv-host-size", "64MB")
    args.resolve_once()
    outcome = arguments.resolved(args)
    assert (outcome.radix_cache_backend, outcome.enable_hierarchical_cache) == ("tiered_kv", True)
    assert (outcome.page_size, outcome.tiered_kv_policy) == (64, "slack")
    assert args.attention_backend is None
    assert arguments.attention_backends(args) == ("torch_native", "torch_native")
    assert args.to_config().host.size_bytes == 64_000_000
    args.resolve_once()


def test_sglang_measures_no_room_for_host_pools_of_its_own(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse to start where less than the 10 GiB that it leaves free are there."""
    from sglang.srt.mem_cache import hicache_auto_size

    args = parse(model, "--tiered-kv", "--tiered-kv-host-size", "64MB")
    args.resolve_once()
    fraction = arguments.resolved(args).hicache_host_memory_fraction
    monkeypatch.setattr(
        hicache_auto_size,
        "get_memory",
        lambda: SimpleNamespace(hicache_host_memory_fraction=fraction, hicache_ratio=2.0),
    )
    with hicache_auto_size.auto_size_hicache(None, None, enabled=True):
        pass


def test_without_the_flag_it_resolves_as_sglangs(model: str) -> None:
    ours, stock = parse(model), STOCK(model_path=model, device="cpu")
    ours.resolve_once()
    stock.resolve_once()
    expected = stock.resolved_dict()
    found = ours.resolved_dict()
    for name in expected.keys() - NOT_COMPARED:
        assert found[name] == expected[name], name


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--tiered-kv", "--disable-radix-cache"), "does not support --disable-radix-cache"),
        (("--tiered-kv", "--smg-grpc-mode"), "does not support --smg-grpc-mode"),
        (("--tiered-kv", "--grpc-port", "50051"), "does not support --grpc-port"),
        (("--tiered-kv", "--prefill-decode-interval", "2"), "--prefill-decode-interval"),
        (("--tiered-kv-host-size", "8GB"), "has no effect without --tiered-kv"),
    ],
)
def test_a_mistake_is_a_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], model: str, argv: tuple[str, ...], sentence: str
) -> None:
    args = parse(model, *argv)
    with pytest.raises(SystemExit) as exit_:
        args.resolve_once()
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_in_a_program_it_is_an_exception(model: str) -> None:
    args = ServerArgs(model_path=model, device="cpu", tiered_kv=True, disable_radix_cache=True)
    with pytest.raises(ConfigError, match="--disable-radix-cache"):
        args.resolve_once()


@pytest.mark.parametrize("name", ["SGLANG_RUST_SERVER", "SGLANG_GRPC_PORT"])
def test_front_ends_outside_python_are_refused(
    model: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    args = ServerArgs(model_path=model, device="cpu", tiered_kv=True)
    with pytest.raises(ConfigError, match=f"unset {name}"):
        args.resolve_once()


def test_who_unpickles_it_is_prepared(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[bool] = []
    monkeypatch.setattr(process_carrier, "prepare_child_process", lambda: prepared.append(True))
    args = parse(model, "--tiered-kv")
    args.resolve_once()
    copy = pickle.loads(pickle.dumps(args))
    assert isinstance(copy, ServerArgs)
    assert prepared == [True]
    assert arguments.resolved(copy).page_size == 64
    copy.resolve_once()
    pickle.loads(pickle.dumps(parse(model)))
    assert prepared == [True]
