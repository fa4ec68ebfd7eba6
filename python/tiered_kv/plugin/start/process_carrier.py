"""Brings the plugin into the processes that SGLang starts.

SGLang loads plugins in the main process and in the schedulers, but not in the detokenizer, in extra
tokenizer workers or in Ray actors. All of them receive the server's arguments by pickle, so ours
carry the plugin along: unpickling them prepares the process (`ServerArgs.__setstate__`).
"""

from __future__ import annotations

from tiered_kv.plugin.options import cascade as cascade_option

RADIX_CACHE_BACKEND = "tiered_kv"
"""The name under which our factory is registered with SGLang."""


def prepare_main_process() -> None:
    """Check all of SGLang that we touch and install every hook, in the process that parses flags.

    Most hooks are needed in other processes only, and do nothing here; but here a missing one still
    is a plain message and an exit code. Raises UpstreamError.
    """
    from tiered_kv.plugin.hooks import table as hooks
    from tiered_kv.plugin.hooks.hook import Process
    from tiered_kv.plugin.upstream import release as upstream

    upstream.verify()
    hooks.install(Process)
    for process in Process:
        hooks.verify_installed(process)
    _register_radix_cache()
    _set_up_routes()


def prepare_child_process() -> None:
    """Install what is needed in a process that has just received the server's arguments.

    multiprocessing unpickles the function to run before its arguments, so the modules that are
    loaded tell which kind of process this is. Raises UpstreamError, which ends the process.
    """
    from sglang.srt.plugins import load_plugins

    from tiered_kv.plugin.hooks import table as hooks
    from tiered_kv.plugin.hooks.hook import Process
    from tiered_kv.plugin.upstream import installed

    load_plugins()
    installed.verify_version()
    processes = hooks.loaded_processes()
    hooks.install(processes)
    if Process.HTTP_SERVER in processes:
        _set_up_routes()
    if Process.SCHEDULER in processes:
        _register_radix_cache()
        _register_attention_backend()


def _set_up_routes() -> None:
    from sglang.srt.entrypoints import http_server

    from tiered_kv.plugin.control import endpoint as orders
    from tiered_kv.plugin.prompts import endpoint as prompts
    from tiered_kv.plugin.requests import guard
    from tiered_kv.plugin.snapshots import endpoint as snapshots

    snapshots.add_route(http_server.app)
    prompts.add_routes(http_server.app)
    orders.add_route(http_server.app)
    guard.answer_with_400(http_server.app)


def _register_attention_backend() -> None:
    if "cuda" not in cascade_option.BACKENDS:
        return
    from tiered_kv.plugin.attention import flashinfer as cascade_flashinfer

    cascade_flashinfer.register()


def _register_radix_cache() -> None:
    # Not in the entry point: importing SGLang's registry takes seconds.
    from sglang.srt.mem_cache import registry

    from tiered_kv.plugin.start.tree_cache import create_tree_cache

    if registry.get_radix_cache_factory(RADIX_CACHE_BACKEND) is None:
        registry.register_radix_cache_backend(RADIX_CACHE_BACKEND, create_tree_cache)
