"""What cannot work is refused at the start: one sentence, an exit code, no server left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.demo_model import host_size
from harness.server import FLOAT32, Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--tiered-kv-disk-dir", "{file}/disk"],
            "error: --tiered-kv-disk-dir cannot be {file}/disk because {file} is a file; name",
        ),
        (["--tiered-kv-host-size", "much"], "much"),
        (["--tiered-kv-no-such-option", "1"], "--tiered-kv-no-such-option"),
    ],
    ids=["disk below a file", "no size", "unknown option"],
)
def test_bad_options(
    make_server: Callable[..., Server], tmp_path: Path, args: list[str], sentence: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = [arg.format(file=file) for arg in args]
    server = make_server(f"bad{abs(hash(sentence))}", "--tiered-kv", *given).launch()

    assert server.wait_for_refusal() == 2
    # The last, but for what 0.5.23 says as it ends.
    assert any(sentence.format(file=file) in said for said in server.messages()[-2:])
    assert "Traceback" not in server.log_text()


def test_a_host_pool_of_three_pages(make_server: Callable[..., Server]) -> None:
    args = ["--page-size", 16, "--max-total-tokens", 1024, "--tiered-kv-disk-dir", "none"]
    args += ["--tiered-kv", "--tiered-kv-host-size", host_size(3 * 16)]
    server = make_server("host_too_small", *FLOAT32, *args).launch()

    assert server.wait_for_refusal() != 0
    assert (
        "is too small: a page of 16 tokens takes 737280 bytes here and at least 4 pages are "
        "needed; raise --tiered-kv-host-size to 2949120 bytes or more"
    ) in server.log_text()
