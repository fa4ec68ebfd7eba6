"""Starts that must be refused, and the start that must be SGLang's own, in fresh processes.

SGLang swallows what a plugin raises. Guarantee: whatever is wrong with the plugin or beneath it, a
server with `--tiered-kv` says so and exits non-zero, and one without it is untouched.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from support_plugin import on_release  # noqa: E402

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULE = ("-m", "sglang.launch_server")
SERVE = ("-c", "from sglang.cli.main import main; main()", "serve")

WRONG_VERSION = "import sglang.version\nsglang.version.__version__ = '0.5.16'\n"
BROKEN_PLUGIN = "import sys\nsys.modules['tiered_kv.plugin.start.server_args'] = None\n"
RENAMED_TARGET = """
import dataclasses
import tiered_kv.plugin.hooks.table as hooks
first, *others = hooks.HOOKS
hooks.HOOKS = (dataclasses.replace(first, target=first.target + "_renamed"), *others)
"""
# A container's user that is only a number.
NOBODY = """
import os
import pwd
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
"""
# As if another plugin replaced what we hooked, in the processes that the server starts.
LOST_HOOK = """
import sys
if "--multiprocessing-fork" in sys.argv:
    import tiered_kv.plugin.hooks.table as hooks
    install = hooks.install
    def install_and_lose(processes):
        install(processes)
        if hooks.Process.SCHEDULER in processes:
            from sglang.srt.managers.scheduler import Scheduler
            Scheduler.__init__ = Scheduler.__init__.__wrapped__
    hooks.install = install_and_lose
"""


@pytest.mark.parametrize(
    ("launcher", "beneath", "sentence"),
    [
        (
            MODULE,
            WRONG_VERSION,
            "supports SGLang 0.5.17 and 0.5.23, but 0.5.16 is installed; install sglang==",
        ),
        (MODULE, RENAMED_TARGET, "Scheduler.__init___renamed cannot be hooked (AttributeError: "),
        (MODULE, BROKEN_PLUGIN, "cannot be used because registering it failed with ModuleNotFound"),
        pytest.param(
            SERVE,
            WRONG_VERSION,
            "supports SGLang 0.5.17 and 0.5.23, but 0.5.16 is installed; install sglang==",
            marks=pytest.mark.long,
        ),
    ],
    ids=["another release", "renamed target", "broken plugin", "another release, sglang serve"],
)
def test_refused_before_anything_starts(
    run_python: Any, shim: Any, tiny_model: str, launcher: Any, beneath: str, sentence: str
) -> None:
    ended = run_python(
        *launcher,
        *("--model-path", tiny_model, "--device", DEVICE, "--load-format", "dummy"),
        *("--model-type", "llm") if launcher is SERVE else (),
        "--tiered-kv",
        env=shim(beneath),
    )
    said = refusal(ended)
    assert said.startswith("sglang serve: error: --tiered-kv ")
    assert sentence in said


def refusal(ended: CompletedProcess[str]) -> str:
    """What a start that was refused says last, but for SGLang's log of having ended."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = ended.stderr.strip().splitlines()
    if "kill_process_tree called" in lines[-1]:
        lines.pop()
    return lines[-1]


def test_a_user_without_a_name_and_a_home_is_asked_for_the_disks_directory(
    run_python: Any, shim: Any, tiny_model: str, tmp_path: Path
) -> None:
    """torch wants a name and FlashInfer a home, before SGLang loads any plugin."""
    ended = run_python(
        *(*MODULE, "--model-path", tiny_model, "--device", DEVICE, "--load-format", "dummy"),
        "--tiered-kv",
        env={**shim(NOBODY), "TMPDIR": str(tmp_path)},
    )
    said = refusal(ended)
    assert said.startswith("sglang serve: error: --tiered-kv-disk-dir has no default because this")


@pytest.mark.long
def test_a_server_whose_scheduler_lost_a_hook_ends(
    run_python: Any, shim: Any, tiny_model: str
) -> None:
    ended = run_python(
        *("-m", "sglang.launch_server", "--model-path", tiny_model, "--device", DEVICE),
        *("--load-format", "dummy", "--skip-tokenizer-init", "--max-total-tokens", "1024"),
        *("--tiered-kv", "--tiered-kv-host-size", "64MB", "--port", "0"),
        env=shim(LOST_HOOK),
    )
    assert_refused_for_the_hook(ended)


def assert_refused_for_the_hook(ended: CompletedProcess[str]) -> None:
    assert ended.returncode != 0
    assert "UpstreamError: --tiered-kv refuses to start because its hook on " in ended.stderr
    assert "Scheduler.__init__ is not in effect" in ended.stderr


@pytest.mark.long
def test_another_release_makes_the_engine_refuse(
    run_python: Any, shim: Any, tiny_model: str
) -> None:
    code = (
        f"import sglang\nsglang.Engine(model_path={tiny_model!r}, device={DEVICE!r}, tiered_kv=1)"
    )
    ended = run_python("-c", code, env=shim(WRONG_VERSION))
    assert ended.returncode != 0
    assert (
        "UpstreamError: --tiered-kv supports SGLang 0.5.17 and 0.5.23, but 0.5.16" in ended.stderr
    )


def test_another_release_leaves_stock_servers_alone(
    run_python: Any, shim: Any, tiny_model: str
) -> None:
    code = (
        "from sglang.srt.plugins import load_plugins\nload_plugins()\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        f"args = prepare_server_args(['--model-path', {tiny_model!r}, '--device', {DEVICE!r}])\n"
        "print(type(args).__module__, hasattr(args, 'tiered_kv'))\n"
    )
    ended = run_python("-c", code, env=shim(WRONG_VERSION))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["sglang.srt.server_args", "False"]


STOCK = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", sys.argv[1], "--device", sys.argv[2]])
early = [name for name in sys.modules if name.startswith("sglang.")]
ours = sorted(n for n in sys.modules if n.startswith("tiered_kv."))
import sglang.srt.managers.scheduler
import sglang.srt.managers.scheduler_components.weight_updater
from sglang.srt.mem_cache.registry import registered_radix_cache_backends
from sglang.srt.plugins.hook_registry import HookRegistry
import pickle, pkgutil
pickle.loads(pickle.dumps(args))
from tiered_kv.plugin.hooks.table import HOOKS
print(json.dumps({
    "early": early,
    "ours": ours,
    "backends": registered_radix_cache_backends(),
    "hooked_by_us": [
        target for target, hooks in HookRegistry._hooks.items()
        if any(h.__module__.startswith("tiered_kv.") for _, h, _ in hooks)
    ],
    # SGLang decorates some of its functions itself: look for wrappers that a hook would make.
    "wrapped": [
        h.target for h in HOOKS
        if "hook_registry" in pkgutil.resolve_name(h.target).__code__.co_filename
    ],
}))
"""


def found_by(run_python: Any, code: str, tiny_model: str) -> Any:
    ended = run_python("-c", code, tiny_model, DEVICE, env={"SGLANG_PLUGINS": "tiered_kv"})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stock(run_python: Any, tiny_model: str) -> Any:
    """What is there in a process that loaded plugins and has no `--tiered-kv`."""
    return found_by(run_python, STOCK, tiny_model)


def test_without_the_flag_nothing_of_sglang_is_patched(stock: Any) -> None:
    found = stock
    assert found["hooked_by_us"] == ["sglang.srt.server_args.ServerArgs"]
    assert found["wrapped"] == []
    assert "tiered_kv" not in found["backends"]
    # Neither what we hook nor the tiers are imported for a server that doesn't want them.
    assert not {"tiered_kv.plugin.cache.build", "tiered_kv.plugin.hooks.table"} & set(found["ours"])
    assert not [name for name in found["ours"] if name.startswith("tiered_kv.tiers")]


WITHOUT_PLUGINS = """
import json, sys
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", sys.argv[1], "--device", sys.argv[2]])
print(json.dumps(sorted(n for n in sys.modules if n.startswith("sglang."))))
"""


def test_without_the_flag_no_module_of_sglang_is_loaded_earlier(
    run_python: Any, tiny_model: str, stock: Any
) -> None:
    more = set(stock["early"]) - set(found_by(run_python, WITHOUT_PLUGINS, tiny_model))
    assert not [name for name in more if not name.startswith("sglang.srt.plugins")]


UNPICKLE = """
import importlib, json, pickle, sys
importlib.import_module(sys.argv[1])
from pathlib import Path
args = pickle.loads(Path(sys.argv[2]).read_bytes())
import sglang.srt.plugins, sglang.srt.server_args
from tiered_kv.plugin.hooks import table as hooks
registry = sys.modules.get("sglang.srt.mem_cache.registry")
verified = []
for process in hooks.loaded_processes():
    hooks.verify_installed(process)
    verified.append(process.name)
print(json.dumps({
    "class": sglang.srt.server_args.ServerArgs.__module__,
    "plugins_loaded": sglang.srt.plugins._plugins_loaded,
    "verified": verified,
    "backends": registry.registered_radix_cache_backends() if registry else [],
    "scheduler_loaded": "sglang.srt.managers.scheduler" in sys.modules,
    "host_size": args.to_config().host.size_bytes,
}))
"""


# What a scheduler does before it makes its cache, and how it asks for ours.
MAKE_CACHE = """
import pickle, sys
import sglang.srt.managers.scheduler
from pathlib import Path
args = pickle.loads(Path(sys.argv[1]).read_bytes())
from sglang.srt.mem_cache.registry import get_radix_cache_factory
get_radix_cache_factory("tiered_kv")(None)
"""


@pytest.fixture
def pickled(tmp_path: Path, tiny_model: str) -> str:
    """A file of the arguments that a server's processes are given."""
    from tiered_kv.plugin.start.server_args import ServerArgs

    args = ServerArgs(
        model_path=tiny_model,
        device=DEVICE,
        tiered_kv=True,
        tiered_kv_host_size="1GB",
        tiered_kv_disk_dir=str(tmp_path / "disk"),
    )
    file = tmp_path / "arguments"
    file.write_bytes(pickle.dumps(on_release.resolve(args)))
    return str(file)


def test_a_hook_lost_in_the_scheduler_is_refused_by_the_scheduler(
    run_python: Any, shim: Any, pickled: str
) -> None:
    ended = run_python("-c", MAKE_CACHE, pickled, "--multiprocessing-fork", env=shim(LOST_HOOK))
    assert_refused_for_the_hook(ended)


@pytest.mark.parametrize(
    ("module", "processes"),
    [
        ("sglang.srt.managers.scheduler", {"SCHEDULER"}),
        ("sglang.srt.managers.detokenizer_manager", {"DETOKENIZER", "TOKENIZER"}),
        pytest.param(
            "sglang.srt.managers.multi_tokenizer_mixin", {"TOKENIZER"}, marks=pytest.mark.long
        ),
    ],
)
def test_arguments_prepare_the_process_that_unpickles_them(
    run_python: Any, pickled: str, module: str, processes: set[str]
) -> None:
    ended = run_python("-c", UNPICKLE, module, pickled)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["class"] == "tiered_kv.plugin.start.server_args"
    assert found["plugins_loaded"]
    assert found["host_size"] == 10**9
    assert processes == set(found["verified"])
    is_scheduler = "SCHEDULER" in processes
    assert ("tiered_kv" in found["backends"]) == is_scheduler
    assert found["scheduler_loaded"] == is_scheduler  # nobody else has to carry it
