"""scripts/get_demo_model makes a model that ends its answers, and refuses what it doesn't know."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
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


def test_without_a_home_it_says_what_to_set(tmp_path: Path) -> None:
    """A container's user may be a number that no passwd file knows."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "XDG_CACHE_HOME", "TIERED_KV_CACHE_DIR")
    }
    program = (
        "import os, pwd, runpy, sys\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for flags in ([], ["--where"]):
        result = subprocess.run(
            [sys.executable, "-c", program, str(SCRIPT), *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert "set TIERED_KV_CACHE_DIR" in line


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("get_demo_model", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_weights_come_back_from_how_llama_cpp_stores_them(
    tmp_path: Path, script: ModuleType
) -> None:
    """Two query heads on one of KV; the numbers are ones that bfloat16 has."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    hidden, head_dim = 64, 32
    shapes = {
        "self_attn.q_proj": ("attn_q", 2 * head_dim, hidden),
        "self_attn.k_proj": ("attn_k", head_dim, hidden),
        "self_attn.v_proj": ("attn_v", head_dim, hidden),
        "mlp.down_proj": ("ffn_down", hidden, hidden),
    }
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    expected = {}
    for name, (stored_name, rows, columns) in shapes.items():
        weight = rng.integers(-100, 100, (rows, columns)).astype(np.float32)
        expected[f"model.layers.0.{name}.weight"] = weight
        stored = weight
        if stored_name in ("attn_q", "attn_k"):
            halves = weight.reshape(rows // head_dim, 2, head_dim // 2, columns)
            stored = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.0.{stored_name}.weight", np.ascontiguousarray(stored))
    embedding = rng.standard_normal((8, hidden)).astype(np.float32)
    q8 = GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", quantize(embedding, q8), raw_dtype=q8)
    writer.add_tensor("output_norm.weight", np.full(hidden, 1.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    script.write_weights(script.Gguf(tmp_path / "tiny.gguf"), tmp_path)

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.bfloat16"}
    values = {name: tensor.float().numpy() for name, tensor in found.items()}
    assert np.all(values.pop("model.norm.weight") == 1.5)
    assert np.abs(values.pop("model.embed_tokens.weight") - embedding).max() < 0.05
    assert values.keys() == expected.keys()
    for name, weight in expected.items():
        assert np.array_equal(values[name], weight), name


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
