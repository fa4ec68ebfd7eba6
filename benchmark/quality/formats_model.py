"""A model that goes on from KV which went through a page format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sgl_kernel_ext.formats import Format, Role
from sgl_kernel_ext.ops import PagePool, gather_pages, layout_of, scatter_pages

#: Tokens of a long text that are computed at once.
CHUNK_TOKENS = 512
#: Tokens of an answer that are checked at once: most that differ do so early.
CHECKED_TOKENS = 8


@dataclass(frozen=True)
class Text:
    """A text's tokens, and K and V of all of them: (tokens, heads, head_dim), layer by layer."""

    ids: torch.Tensor
    buffers: list[torch.Tensor]
    """Layer 0's K, layer 0's V, layer 1's K, ..."""

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ThroughFormat:
    """The KV of a text's whole pages after they were written down in a format and read back."""

    text: Text
    buffers: list[torch.Tensor]
    token_bytes: float
    key_error: float
    """Root mean square of what changed, as a share of the root mean square of what was."""
    value_error: float


def kv_through(format_: Format, page_size: int, text: Text) -> ThroughFormat:
    """Takes the whole pages through the ops that the server's copies call."""
    n_layers = len(text.buffers) // 2
    layers = [layer for layer in range(n_layers) for _ in range(2)]
    layout = layout_of(format_, page_size, text.buffers, layers, [Role.KEY, Role.VALUE] * n_layers)
    pool = PagePool(text.buffers, layout, debug=True)
    pages = torch.arange(pool.n_pages)
    rows = torch.empty(pool.n_pages, layout.page_bytes, dtype=torch.uint8)
    gather_pages(pool, pages, rows)
    back = [torch.zeros_like(buffer) for buffer in text.buffers]
    scatter_pages(PagePool(back, layout, debug=True), pages, rows)
    n_tokens = pool.n_pages * page_size
    keys = relative_error(text.buffers[0::2], back[0::2], n_tokens)
    values = relative_error(text.buffers[1::2], back[1::2], n_tokens)
    return ThroughFormat(text, back, layout.token_bytes, keys, values)


def relative_error(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], n_tokens: int
) -> float:
    changed, total = 0.0, 0.0
    for a, b in zip(before, after, strict=True):
        changed += float((b[:n_tokens].float() - a[:n_tokens].float()).square().sum())
        total += float(a[:n_tokens].float().square().sum())
    return (changed / total) ** 0.5


class FormatModel:
    """A causal language model of one sequence at a time, on the CPU."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def read(self, text: str, n_parts: int = 1) -> list[Text]:
        """Tokens and exact KV of each of `n_parts` equal parts of a text."""
        ids = self._tokenizer(text, return_tensors="pt").input_ids[0]
        step = len(ids) // n_parts
        return [self._read(ids[part * step : (part + 1) * step]) for part in range(n_parts)]

    def _read(self, ids: torch.Tensor) -> Text:
        cache = DynamicCache()
        for at in range(0, len(ids), CHUNK_TOKENS):
            self._logits(ids[None, at : at + CHUNK_TOKENS], cache, n_last=1)
        buffers = []
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                buffers.append(tensor[0].transpose(0, 1).contiguous())
        return Text(ids, buffers)

    def score(self, through: ThroughFormat, start: int, end: int) -> tuple[float, list[int]]:
        """(mean negative log-likelihood of tokens [start + 1, end), the best token at each)."""
        ids = through.text.ids[start:end]
        logits = self._logits(ids[None, :-1], prefix_cache([through.buffers], [start]))[0].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        return float(loss), logits.argmax(-1).tolist()

    def agreeing_tokens(
        self, through: ThroughFormat, end: int, answer: Sequence[int], page_size: int
    ) -> int:
        """How many leading tokens of raw's answer to text[:end] are the best here as well.

        What precedes them is the same as long as they agree, so this is how long greedy answers do.
        """
        start = (end - 1) // page_size * page_size
        cache = prefix_cache([through.buffers], [start])
        ids = through.text.ids[start:end]
        for at in range(0, len(answer), CHECKED_TOKENS):
            part = answer[at : at + CHECKED_TOKENS]
            given = torch.tensor(part, dtype=torch.int64)
            # A token's successor is found with the token: the part's last one is for the next.
            fed = torch.cat([ids, given[:-1]])
            best = self._logits(fed[None], cache, n_last=len(part))[0].argmax(-1).tolist()
            for i, (ours, theirs) in enumerate(zip(best, part, strict=True)):
                if ours != theirs:
                    return at + i
            ids = given[-1:]
        return len(answer)

    def generate(self, text: Text, ends: Sequence[int], n_tokens: int) -> list[list[int]]:
        """Greedy answers to text[:end], for several ends at once, from exact KV."""
        cache = prefix_cache([text.buffers] * len(ends), [end - 1 for end in ends])
        width = max(ends) - 1
        position = torch.tensor(ends)[:, None] - 1
        is_there = (torch.arange(width)[None] >= width - position).long()
        last = text.ids[torch.tensor(ends) - 1][:, None]
        answers: list[torch.Tensor] = []
        for _ in range(n_tokens):
            is_there = torch.cat([is_there, torch.ones_like(last)], dim=1)
            logits = self._logits(last, cache, is_there=is_there, position=position)
            last = logits[:, -1:].argmax(-1)
            answers.append(last)
            position = position + 1
        return [[int(token) for token in row] for row in torch.cat(answers, dim=1)]

    def _logits(
        self,
        ids: torch.Tensor,
        cache: DynamicCache,
        *,
        n_last: int = 0,
        is_there: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(sequences, the last `n_last` tokens or all of them, vocabulary); the cache grows."""
        output = self._model(
            input_ids=ids,
            past_key_values=cache,
            attention_mask=is_there,
            position_ids=position,
            use_cache=True,
            logits_to_keep=n_last,
        )
        logits: torch.Tensor = output.logits
        return logits


def prefix_cache(rows: Sequence[Sequence[torch.Tensor]], lengths: Sequence[int]) -> DynamicCache:
    """The first lengths[i] tokens of each row's buffers, padded with zeros on the left."""
    cache = DynamicCache()
    width = max(lengths)
    for layer in range(len(rows[0]) // 2):
        pair = []
        for which in (0, 1):
            first = rows[0][2 * layer + which]
            block = first.new_zeros((len(rows), width, *first.shape[1:]))
            for i, (buffers, length) in enumerate(zip(rows, lengths, strict=True)):
                block[i, width - length :] = buffers[2 * layer + which][:length]
            pair.append(block.transpose(1, 2))
        cache.update(*pair, layer)
    return cache
