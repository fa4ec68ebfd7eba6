"""What SGLang runs in its processes, through `tiered_kv_entry_points`.

SGLang logs and swallows whatever a plugin raises, and then serves without it. So `register` never
raises: if the plugin cannot work, it leaves `--tiered-kv` behind as a flag that says why.
"""

from __future__ import annotations

from tiered_kv.core.errors import UpstreamError


def register() -> None:
    """Put our `ServerArgs` in the place of SGLang's; all else waits until the flag is on.

    The radix-cache factory and the hooks are installed by `process_carrier`, because importing
    what they attach to takes seconds that a server without the flag should not spend here.
    """
    from tiered_kv.plugin.start import unavailable
    from tiered_kv.plugin.upstream import installed

    try:
        installed.verify_version()
        _replace_server_args()
    except UpstreamError as error:
        unavailable.install(str(error))
    except Exception as error:  # an unforeseen upstream: same treatment, the cause in the sentence
        unavailable.install(
            f"--tiered-kv cannot be used because registering it failed with "
            f"{type(error).__name__}: {error}; {installed.ADVICE}"
        )


def _replace_server_args() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from tiered_kv.plugin.start.engine import loaded_engine
    from tiered_kv.plugin.start.server_args import ServerArgs

    HookRegistry.register("sglang.srt.server_args.ServerArgs", ServerArgs, HookType.REPLACE)
    # Where Engine's module is not loaded yet, it will bind ours.
    engine_class = loaded_engine()
    if engine_class is not None and engine_class.server_args_class is ServerArgs.__mro__[1]:
        engine_class.server_args_class = ServerArgs
