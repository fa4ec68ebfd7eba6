"""The ServerArgs subclass, in this process: parsing, YAML, resolution, copies, pickling.

Guarantee: without `--tiered-kv` it resolves to what SGLang's own class resolves to; with it the
derived values are set, survive every copy, and mistakes give one sentence and exit code 2.
A model is needed for its configuration only: a few lines of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from support_plugin import on_release  # noqa: E402

if not on_release.IS_0_5_17:
    pytest.skip("a Struct on 0.5.23: test_server_args_struct.py", allow_module_level=True)

from sglang.srt.plugins import load_plugins  # noqa: E402

from support.tiny_llama import write_config  # noqa: E402
from tiered_kv.core.config import TieredKVConfig  # noqa: E402
from tiered_kv.core.errors import ConfigError  # noqa: E402

load_plugins()

import sglang.srt.server_args as upstream_server_args  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

from tiered_kv.plugin.start import process_carrier  # noqa: E402
from tiered_kv.plugin.start.server_args import ServerArgs, own_fields  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STOCK = ServerArgs.__mro__[1]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a Llama's configuration and no weights."""
    return write_config(tmp_path)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps the default disk directory out of the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parse(model: str, *argv: str) -> Any:
    return prepare_server_args(["--model-path", model, "--device", DEVICE, *argv])


def refused(capsys: pytest.CaptureFixture[str], model: str, *argv: str) -> str:
    """The last line of what a refused command line prints; it must exit with code 2."""
    with pytest.raises(SystemExit) as exit_:
        parse(model, *argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_plugin_put_the_class_in_place() -> None:
    assert upstream_server_args.ServerArgs is ServerArgs
    assert ServerArgs.__qualname__ == STOCK.__qualname__


# -- without the flag --------------------------------------------------------------------------


def test_without_the_flag_every_value_is_sglangs_own(model: str) -> None:
    kwargs = {"model_path": model, "device": DEVICE, "random_seed": 1, "nccl_port": 1}
    ours, stock = ServerArgs(**kwargs), STOCK(**kwargs)
    for field in dataclasses.fields(STOCK):
        assert getattr(ours, field.name) == getattr(stock, field.name), field.name
    extra = {name for name in vars(ours) if name not in vars(stock)}
    assert extra == {field.name for field in own_fields()}


def test_without_the_flag_the_command_line_gives_sglangs_own(model: str) -> None:
    argv = ["--model-path", model, "--device", DEVICE, "--random-seed", "1", "--page-size", "4"]
    parser = argparse.ArgumentParser()
    STOCK.add_cli_args(parser)
    stock = STOCK.from_cli_args(parser.parse_args(argv))
    ours = prepare_server_args(argv)
    for field in dataclasses.fields(STOCK):
        assert getattr(ours, field.name) == getattr(stock, field.name), field.name


def test_without_the_flag_no_preparation(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise AssertionError("a stock server was prepared")

    monkeypatch.setattr(process_carrier, "prepare_main_process", forbidden)
    monkeypatch.setattr(process_carrier, "prepare_child_process", forbidden)
    stock = parse(model)
    assert pickle.loads(pickle.dumps(stock)) == stock


# -- with the flag -----------------------------------------------------------------------------


def test_defaults_and_derived_values(model: str, cache_home: Path) -> None:
    args = parse(model, "--tiered-kv")
    assert args.radix_cache_backend == "tiered_kv"
    assert args.enable_hierarchical_cache
    assert args.enable_cache_report
    assert args.page_size == 64
    assert args.hicache_storage_backend is None
    config: TieredKVConfig = args.to_config()
    assert config.page_size == 64
    assert config.host.size_bytes is None
    assert config.host.ratio == 2.0
    assert config.disk.directory == cache_home / "tiered_kv" / "disk"
    assert config.disk.size_bytes is not None
    assert 0 < config.disk.size_bytes <= 32 * 10**9
    assert not config.disk.directory.exists()  # parsing writes nothing


def test_every_option_reaches_the_configuration(model: str, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.touch()
    args = parse(
        model,
        *("--tiered-kv", "--page-size", "16", "--tiered-kv-host-size", "1GiB"),
        *("--tiered-kv-host-ratio", "3", "--tiered-kv-disk-dir", str(tmp_path / "kv")),
        *("--tiered-kv-disk-size", "5GB", "--tiered-kv-clear-disk"),
        *("--tiered-kv-disk-io-threads", "2", "--tiered-kv-disk-io", "buffered"),
        *("--tiered-kv-disk-key-file", str(key_file)),
        "--tiered-kv-debug-integrity",
    )
    config = args.to_config()
    assert config.page_size == 16
    assert (config.host.size_bytes, config.host.ratio) == (1 << 30, 3.0)
    assert (config.disk.directory, config.disk.size_bytes) == (tmp_path / "kv", 5 * 10**9)
    assert (config.disk.io_threads, config.disk.io_mode) == (2, "buffered")
    assert config.disk.key_file == key_file
    assert config.disk.clear_on_start
    assert args.tiered_kv_debug_integrity


def test_the_disks_size_is_that_of_all_ranks_together(model: str) -> None:
    """How many share it depends on the model, which is not there yet."""
    args = parse(model, "--tiered-kv", "--tiered-kv-disk-size", "8GB", "--tp-size", "2")
    assert args.to_config().disk.size_bytes == 8 * 10**9


def test_no_disk(model: str) -> None:
    config = parse(model, "--tiered-kv", "--tiered-kv-disk-dir", "none").to_config()
    assert not config.disk.enabled
    assert config.host.enabled


def test_yaml_file(model: str, tmp_path: Path) -> None:
    yaml = tmp_path / "server.yaml"
    yaml.write_text(
        "tiered-kv: true\ntiered-kv-host-size: 8\ntiered-kv-disk-dir: ~\n"
        "tiered-kv-disk-io: direct\n"
    )
    config = parse(model, "--config", str(yaml)).to_config()
    assert config.host.size_bytes == 8 * 10**9
    assert not config.disk.enabled  # SGLang writes YAML's null as None
    assert config.disk.io_mode == "direct"


def test_python_values_as_sgl_engine_passes_them(model: str) -> None:
    args = ServerArgs(
        model_path=model,
        device=DEVICE,
        tiered_kv=True,
        tiered_kv_host_size=0.5,
        tiered_kv_disk_dir="none",
    )
    assert args.to_config().host.size_bytes == 5 * 10**8
    with pytest.raises(ValueError, match="--tiered-kv-host-size must be a positive size"):
        ServerArgs(model_path=model, device=DEVICE, tiered_kv=True, tiered_kv_host_size="much")


def test_engine_uses_our_class() -> None:
    from sglang.srt.entrypoints.engine import Engine

    assert Engine.server_args_class is ServerArgs


def test_copies_and_pickles_keep_everything(model: str) -> None:
    args = parse(model, "--tiered-kv", "--tiered-kv-host-size", "1GB")
    copy = pickle.loads(pickle.dumps(args))
    # SGLang's lazily made ModelConfig has no equality.
    assert {**vars(copy), "model_config": None} == {**vars(args), "model_config": None}
    assert isinstance(copy, ServerArgs)
    replaced = dataclasses.replace(args, random_seed=7)
    assert (replaced.random_seed, replaced.to_config()) == (7, args.to_config())


def test_a_server_has_a_number_that_its_processes_are_told_and_no_other_has(model: str) -> None:
    args, others = parse(model, "--tiered-kv"), parse(model, "--tiered-kv")
    assert pickle.loads(pickle.dumps(args)).server_number == args.server_number
    assert args.server_number != others.server_number


def test_server_info_can_show_it(model: str) -> None:
    from sglang.srt.utils.msgspec_utils import msgspec_to_builtins

    shown = msgspec_to_builtins(dataclasses.asdict(parse(model, "--tiered-kv")))
    ours = {name: value for name, value in shown.items() if name.startswith("tiered_kv")}
    assert set(ours) == {field.name for field in own_fields()}
    assert json.loads(json.dumps(ours)) == ours


def test_resolved_arguments_are_read_only_as_sglangs_are(model: str) -> None:
    copy = pickle.loads(pickle.dumps(parse(model, "--tiered-kv")))
    with pytest.raises(AttributeError, match="read-only"):
        copy.tiered_kv_host_size = "1GB"


def test_sglangs_configuration_bags_carry_our_fields(model: str) -> None:
    from sglang.srt.arg_groups.arg_utils import namespace_of

    namespaces = namespace_of(ServerArgs)
    assert {namespaces[field.name] for field in own_fields()} == {"memory"}


# -- who orders the waiting queue --------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "policy"),
    [
        ([], "slack"),
        (["--tiered-kv-policy", "hrrn"], "hrrn"),
        (["--tiered-kv-policy", "upstream"], "upstream"),
        (["--schedule-policy", "lpm"], "upstream"),
        (["--schedule-policy", "fcfs"], "upstream"),  # SGLang's default, but it was named
        (["--schedule-policy", "lof", "--tiered-kv-policy", "upstream"], "upstream"),
        (["--enable-priority-scheduling"], "upstream"),
    ],
    ids=" ".join,
)
def test_who_orders_the_queue(model: str, argv: list[str], policy: str) -> None:
    args = parse(model, "--tiered-kv", *argv)
    assert args.tiered_kv_policy == policy
    assert args.schedule_policy == (argv[1] if argv[:1] == ["--schedule-policy"] else "fcfs")
    assert dataclasses.replace(args, random_seed=7).tiered_kv_policy == policy


def test_who_orders_the_queue_in_python(model: str) -> None:
    def made(**fields: Any) -> Any:
        return ServerArgs(model_path=model, device=DEVICE, tiered_kv=True, **fields)

    assert made().tiered_kv_policy == "slack"
    assert made(schedule_policy="lpm").tiered_kv_policy == "upstream"
    assert made(tiered_kv_policy="edf").tiered_kv_policy == "edf"
    with pytest.raises(ConfigError, match=r"one of upstream, atlas, dfs-weight, .*not 'best'"):
        made(tiered_kv_policy="best")


# -- help and mistakes -------------------------------------------------------------------------


def test_help_groups_our_options() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    ours = parser.format_help().split("\nTiered KV:\n")[1]
    for field in own_fields():
        assert "--" + field.name.replace("_", "-") in ours
    assert "--model-path" not in ours


def test_no_option_of_sglangs_is_shadowed_or_abbreviated_differently() -> None:
    def options(cls: type) -> set[str]:
        parser = argparse.ArgumentParser()
        cls.add_cli_args(parser)  # type: ignore[attr-defined]
        return set(parser._option_string_actions)

    ours = {"--" + field.name.replace("_", "-") for field in own_fields()}
    assert ours <= options(ServerArgs)
    # argparse takes unambiguous prefixes: none of SGLang's may become ambiguous by ours.
    assert not any(option.startswith("--ti") for option in options(STOCK) - ours)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tiered-kv", "--tiered-kv-host-size", "much"], "must be a positive size, not 'much'"),
        (["--tiered-kv", "--tiered-kv-host-size", "0GB"], "must be a positive size"),
        (["--tiered-kv", "--tiered-kv-host-ratio", "two"], "invalid float value: 'two'"),
        (["--tiered-kv", "--tiered-kv-host-ratio", "-1"], "must be a positive number, not -1"),
        (["--tiered-kv", "--tiered-kv-disk-io", "maybe"], "must be one of auto, direct, buffered"),
        (["--tiered-kv", "--tiered-kv-disk-io-threads", "0"], "between 1 and 64 I/O threads"),
        (["--tiered-kv", "--tiered-kv-disk-dir", "/dev/null/kv"], "/dev/null is a file"),
        (
            ["--tiered-kv", "--tiered-kv-disk-dir", "none", "--tiered-kv-disk-size", "1GB"],
            "given a size but no directory",
        ),
        (["--tiered-kv", "--tiered-kv-foo", "1"], "unrecognized arguments: --tiered-kv-foo"),
        (["--tiered-kv-hots-size", "1"], "unrecognized arguments: --tiered-kv-hots-size"),
        (["--tiered-kv-host-size", "8GB"], "--tiered-kv-host-size has no effect without"),
        (["--tiered-kv-clear-disk"], "--tiered-kv-clear-disk has no effect without --tiered-kv"),
        (["--tiered-kv", "--disable-radix-cache"], "does not support --disable-radix-cache"),
        (
            ["--tiered-kv", "--pp-size", "2", "--tiered-kv-policy", "edf"],
            "does not support --pp-size above 1 on this release"
            if on_release.IS_0_5_17
            else "does not support, with --pp-size above 1, --tiered-kv-policy edf",
        ),
        (["--tiered-kv", "--hicache-storage-backend", "file"], "belongs to SGLang's own"),
        (["--tiered-kv", "--page-size", "0"], "does not support a --page-size below 1"),
        (["--tiered-kv", "--chunked-prefill-size", "100"], "no multiple of the page size"),
        (["--radix-cache-backend", "tiered_kv"], "give that flag instead"),
        (
            ["--tiered-kv", "--tiered-kv-policy", "best"],
            "must be one of upstream, atlas, dfs-weight",
        ),
        (["--tiered-kv-policy", "slack"], "--tiered-kv-policy has no effect without --tiered-kv"),
        (
            ["--tiered-kv", "--tiered-kv-policy", "edf", "--schedule-policy", "lpm"],
            "--schedule-policy lpm and --tiered-kv-policy edf both order the waiting queue",
        ),
        (
            ["--tiered-kv", "--tiered-kv-policy", "edf", "--enable-priority-scheduling"],
            "drop one of them, or give --tiered-kv-policy upstream",
        ),
        (
            ["--tiered-kv", "--schedule-policy", "dfs-weight"],
            "in favour of --tiered-kv-policy dfs-weight",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_exit_with_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], model: str, argv: list[str], words: str
) -> None:
    assert words in refused(capsys, model, *argv)


def test_the_same_mistakes_are_value_errors_in_python(model: str) -> None:
    with pytest.raises(ConfigError, match="--disable-radix-cache"):
        ServerArgs(model_path=model, device=DEVICE, tiered_kv=True, disable_radix_cache=True)
    with pytest.raises(ConfigError, match="no effect without --tiered-kv"):
        ServerArgs(model_path=model, device=DEVICE, tiered_kv_host_size="8GB")


def test_a_radix_cache_that_sglang_switches_off_itself(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whisper, dual-chunk attention and others; the model is not the point.
    def switch_off(self: Any) -> None:
        self.disable_radix_cache = True

    monkeypatch.setattr(STOCK, "_handle_page_size", switch_off)
    with pytest.raises(ConfigError, match="SGLang switches its radix cache off"):
        ServerArgs(model_path=model, device=DEVICE, tiered_kv=True)


def test_other_errors_of_sglang_stay_its_own(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise ValueError("something of SGLang's")

    monkeypatch.setattr(STOCK, "_handle_page_size", fail)
    with pytest.raises(ValueError, match="something of SGLang's") as error:
        ServerArgs(model_path=model, device=DEVICE, tiered_kv=True)
    assert not isinstance(error.value, ConfigError)
