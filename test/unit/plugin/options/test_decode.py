"""What `--tiered-kv-iteration-policy` accepts: a sentence for everything else."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang")

from sglang.srt.environ import envs

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options.decode import check
from tiered_kv.scheduler.iteration_policy import iteration_policies


@pytest.mark.parametrize("name", iteration_policies.names())
def test_every_policy_goes_with_one_of_ours(name: str) -> None:
    check(name, "slack")


def test_an_unknown_one_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="round-robin"):
        check("fastest", "slack")


def test_choosing_needs_a_clock() -> None:
    check("all", "upstream")
    with pytest.raises(ConfigError, match="needs the clock of a --tiered-kv-policy"):
        check("slack", "upstream")


def test_sglangs_busy_check_is_refused() -> None:
    with envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(1):
        check("all", "slack")
        with pytest.raises(ConfigError, match="counts requests twice"):
            check("slack", "slack")
