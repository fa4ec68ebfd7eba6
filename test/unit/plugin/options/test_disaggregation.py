"""What servers that only prefill, or only decode, refuse together with `--tiered-kv`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import disaggregation


def arguments(**given: Any) -> SimpleNamespace:
    plain = {"disaggregation_mode": "prefill", "dp_size": 1, "optimistic_prefill_attempts": 0}
    return SimpleNamespace(**{**plain, "tiered_kv_iteration_policy": "all", **given})


@pytest.mark.parametrize("mode", ["null", "prefill"])
def test_accepted(mode: str) -> None:
    disaggregation.check(arguments(disaggregation_mode=mode))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode; start the servers"),
        ({"dp_size": 2}, "--dp-size above 1"),
        ({"optimistic_prefill_attempts": 1}, "drop --optimistic-prefill-attempts"),
        ({"tiered_kv_iteration_policy": "slack"}, "drop --tiered-kv-iteration-policy"),
    ],
    ids=str,
)
def test_refused_with_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        disaggregation.check(arguments(**given))
    assert words in str(error.value)
    assert str(error.value).endswith(".")


def test_chunks_of_one_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DISAGG_STAGING_BUFFER", "1")
    disaggregation.check(arguments(disaggregation_mode="null"))
    with pytest.raises(ConfigError, match="unset it"):
        disaggregation.check(arguments())
