"""What tests of several scripts need."""

from __future__ import annotations

import argparse

import pytest


@pytest.fixture(scope="session")
def server_flags() -> set[str]:
    """Every flag of `sglang.launch_server` with this project installed."""
    from tiered_kv.plugin.start.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return set(parser._option_string_actions)
