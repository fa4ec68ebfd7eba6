"""The quality report's measure: on a tiny model, against straightforward ways to find the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmark.quality.formats_model import FormatModel, Text, ThroughFormat, kv_through
from benchmark.quality.formats_report import FormatResult, Report, table
from sgl_kernel_ext.formats import Format

pytestmark = pytest.mark.timeout(60)

WORDS = (
    *("the", "mill", "pond", "tide", "gate", "wheel", "stone"),
    *("flour", "moves", "slowly", "under", "a", "quiet", "sky"),
)
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> FormatModel:
    return FormatModel(folder, torch.float32)


@pytest.fixture(scope="module")
def text(model: FormatModel) -> Text:
    words = [WORDS[i * i % 7 + i % 6] for i in range(150)]
    with torch.inference_mode():
        return model.read(" ".join(words))[0]


@pytest.fixture(scope="module")
def plain(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def test_the_loss_with_raw_pages_is_that_of_one_pass(
    model: FormatModel, text: Text, plain: LlamaForCausalLM
) -> None:
    with torch.inference_mode():
        logits = plain(text.ids[None]).logits[0]
        loss, best = model.score(kv_through(Format.RAW, PAGE_SIZE, text), 48, 96)
    expected = torch.nn.functional.cross_entropy(logits[48:95], text.ids[49:96])
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert best == logits[48:95].argmax(-1).tolist()


def test_answers_of_several_prompts_at_once_are_those_of_each(
    model: FormatModel, text: Text, plain: LlamaForCausalLM
) -> None:
    ends = [33, 50, 97]
    with torch.inference_mode():
        answers = model.generate(text, ends, 12)
        for end, answer in zip(ends, answers, strict=True):
            ids = text.ids[:end]
            for token in answer:
                assert token == int(plain(ids[None]).logits[0, -1].argmax())
                ids = torch.cat([ids, torch.tensor([token])])


@pytest.mark.parametrize("format_", list(Format))
def test_agreement_is_that_of_answers_generated_from_the_pages(
    model: FormatModel, text: Text, plain: LlamaForCausalLM, format_: Format
) -> None:
    with torch.inference_mode():
        through = kv_through(format_, PAGE_SIZE, text)
        found = []
        for end in (33, 50, 97):
            (answer,) = model.generate(text, [end], 12)
            ours = greedy_from(plain, through, end, 12)
            agreed = [a == b for a, b in zip(ours, answer, strict=True)]
            expected = agreed.index(False) if False in agreed else len(answer)
            assert model.agreeing_tokens(through, end, answer, PAGE_SIZE) == expected
            found.append(expected)
    if format_ is Format.RAW:
        assert found == [12, 12, 12]


def greedy_from(
    plain: LlamaForCausalLM, through: ThroughFormat, end: int, n_tokens: int
) -> list[int]:
    """A greedy answer, token by token, after whole pages in the format and an exact rest."""
    start = (end - 1) // PAGE_SIZE * PAGE_SIZE
    cache = DynamicCache()
    for layer in range(len(through.buffers) // 2):
        pair = through.buffers[2 * layer : 2 * layer + 2]
        cache.update(*(b[:start].transpose(0, 1)[None].clone() for b in pair), layer)
    ids, answer = through.text.ids[start:end], []
    for _ in range(n_tokens):
        token = int(plain(ids[None], past_key_values=cache).logits[0, -1].argmax())
        answer.append(token)
        ids = torch.tensor([token])
    return answer


def test_lossier_formats_change_more(text: Text) -> None:
    errors = {f: kv_through(f, PAGE_SIZE, text).value_error for f in Format}
    assert errors[Format.RAW] == 0
    assert 0 < errors[Format.FP8] < errors[Format.INT4] < errors[Format.INT2]


def test_the_table_says_what_was_measured() -> None:
    raw = FormatResult("raw", 100.0, 0.0, 0.0, [1.0, 2.0], [[1, 2], [3, 4]], [32, 32])
    lossy = FormatResult("int9", 25.0, 0.1, 0.2, [1.1, 2.1], [[1, 0], [3, 4]], [32, 10])
    report = Report("m", "float32", "t.txt", 999, 64, 255, 32, 2, 2, [raw, lossy], 7.0)
    row = table(report, "cmd").splitlines()[-3]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "int9", "25", "25.0%", f"{math.exp(1.6):.3f}", "+10.52% ± 0.00%", "75.0%", "50.0%",
        "21.0 tokens", "10.00%", "20.00%",
    ]  # fmt: skip
    assert report.as_dict()["results"][1]["agreed_tokens"] == [32, 10]
