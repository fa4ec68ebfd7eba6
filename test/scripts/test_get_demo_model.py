"""scripts/get_demo_model makes a model that ends its answers, and refuses what it doesn't know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "get_demo_model"


def get_demo_model(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "TIERED_KV_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_where_says_whether_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    missing = get_demo_model(tmp_path, "--where")
    assert (missing.returncode, missing.stdout.strip()) == (1, str(folder))
    assert not folder.exists()


def test_a_model_that_is_there_is_left_alone(tmp_path: Path, demo_model: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    (cache / "models" / demo_model.name).symlink_to(demo_model)
    before = {path.name: path.stat().st_mtime_ns for path in demo_model.iterdir()}
    result = get_demo_model(cache)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(cache / "models" / demo_model.name)
    assert {path.name: path.stat().st_mtime_ns for path in demo_model.iterdir()} == before


def test_another_file_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    gguf = tmp_path / "other.gguf"
    gguf.write_bytes(b"GGUF")
    result = get_demo_model(tmp_path, "--gguf", str(gguf))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "is not the file this script expects" in line
    assert list((tmp_path / "models").iterdir()) == []


def test_a_file_that_is_not_there_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    result = get_demo_model(tmp_path, "--gguf", str(tmp_path / "nowhere.gguf"))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "nowhere.gguf" in line


def test_weights_are_bfloat16_and_readable_by_all(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["eos_token_id"] == 2
    assert (demo_model / "model.safetensors").stat().st_mode & 0o444 == 0o444


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


def test_an_answer_ends_with_the_end_of_turn(tokenizer) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == 2
    assert tokenizer.encode("<|im_end|>") == [2]


def test_the_chat_template_opens_the_assistants_turn(tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["in 12345 days", "wörld\n  naïve 日本語", "def f(x): return x"])
def test_text_survives_and_numbers_are_read_digit_by_digit(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()]
    assert all(len(token) == 1 for token in digits)
