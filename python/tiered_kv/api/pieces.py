"""Prompts that arrive in pieces: what was sent so far of each, and the request that it becomes.

Retrieval takes as long as prefill, and its results come one by one (Stream2LLM). So a caller opens
a prompt, appends to it and replaces from a point on, and finishes it with what he wants answered.
What is there already can be prefilled meanwhile.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

from tiered_kv.api.fields import TermsError, shortened

IDLE_S = 600.0
"""A prompt that nothing was sent of for so long is forgotten."""
PROMPTS_EACH_MAX = 256
"""As many prompts may be open of one caller,"""
PROMPTS_MAX = 8192
"""and of all: without keys, one may pretend to be many."""
BYTES_EACH_MAX = 64 << 20
"""What the open prompts of one caller may hold, as JSON,"""
BYTES_MAX = 256 << 20
"""and those of all."""
TOKEN_BYTES = 4
"""Of text, about, and less than a token id takes in JSON."""

FROM = "from"


class PieceError(TermsError):
    """What a caller cannot have; `status` is HTTP's word for it."""

    def __init__(self, sentence: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, slots=True)
class Form:
    """A way of giving a prompt: the field it is in, the route that takes it, what it counts in."""

    field: str
    path: str
    unit: str


FORMS = (
    Form("messages", "/v1/chat/completions", "messages"),
    Form("prompt", "/v1/completions", "characters"),
    Form("text", "/generate", "characters"),
    Form("input_ids", "/generate", "tokens"),
)
_NAMES = ", ".join(form.field for form in FORMS)


@dataclass(slots=True)
class Prompt:
    """One prompt, as far as it is there."""

    prompt_id: str
    owner: str
    """Whose it is: nobody else can name it."""
    form: Form
    content: str | list[object]
    rest: dict[str, object]
    """What else its request says."""
    touched_s: float
    n_bytes: int = 0
    version: int = 0
    """Counts what was sent of it."""

    def request(self, more: Mapping[str, object]) -> dict[str, object]:
        """The body of its request, where `more` counts instead of what was said at the opening."""
        return {**self.rest, **more, self.form.field: self.content}

    def put(self, piece: str | list[object], at: object) -> None:
        """Put `piece` where `at` units have gone, None: at the end. Raises PieceError."""
        length = len(self.content)
        if at is None:
            at = length
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= length:
            raise PieceError(
                f"{FROM} must be a number of {self.form.unit} from 0 to {length}, which the prompt "
                f"has, not {shortened(at)}."
            )
        if type(self.content) is not type(piece):
            raise PieceError(
                f"{self.form.field} must be of the kind that the prompt was opened with."
            )
        self.content = cast("Any", self.content[:at]) + piece


@dataclass(slots=True)
class Book:
    """The prompts that are open. Who asks says the time, in seconds of any clock that goes on."""

    _prompts: OrderedDict[str, Prompt] = field(default_factory=OrderedDict)
    """What was not touched for longest is first."""
    _n_bytes: int = 0
    _held: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By owner: how many prompts are open, and what they hold."""

    def __len__(self) -> int:
        return len(self._prompts)

    def open(self, owner: str, body: object, now_s: float) -> Prompt:
        """Raises PieceError."""
        self.forget_idle(now_s)
        found = _piece_in(body)
        if found is None:
            raise PieceError(f"a prompt is opened with one of {_NAMES}.")
        form, piece, rest = found
        if FROM in rest:
            raise PieceError(f"{FROM} goes with a prompt that is open; leave it out.")
        if len(self._prompts) >= PROMPTS_MAX:
            raise PieceError(
                f"{PROMPTS_MAX} prompts are open, which is as many as the server keeps; send this "
                "one whole, or later.",
                HTTPStatus.SERVICE_UNAVAILABLE,
            )
        if self._held.get(owner, (0, 0))[0] >= PROMPTS_EACH_MAX:
            raise PieceError(
                f"{PROMPTS_EACH_MAX} of your prompts are open, which is as many as one caller may "
                "have; finish or delete some.",
                HTTPStatus.TOO_MANY_REQUESTS,
            )
        prompt = Prompt(secrets.token_urlsafe(18), owner, form, piece, rest, now_s)
        self._account(prompt, _n_bytes(prompt.request({})), n_opened=1)
        self._prompts[prompt.prompt_id] = prompt
        return prompt

    def find(self, owner: str, prompt_id: str, now_s: float) -> Prompt:
        """It stays open for `IDLE_S` from now. Raises PieceError if the owner has none such."""
        self.forget_idle(now_s)
        prompt = self._prompts.get(prompt_id)
        if prompt is None or prompt.owner != owner:
            raise PieceError(
                f"no prompt {shortened(prompt_id)} is open: it was finished, deleted, not touched "
                f"for {IDLE_S:.0f} s, or the server was started anew; open it again.",
                HTTPStatus.NOT_FOUND,
            )
        prompt.touched_s = now_s
        self._prompts.move_to_end(prompt_id)
        return prompt

    def change(self, owner: str, prompt_id: str, body: object, now_s: float) -> Prompt:
        """Append a piece, or put it in place of what comes after a point. Raises PieceError."""
        prompt = self.find(owner, prompt_id, now_s)
        found = _piece_in(body)
        if found is None or found[2].keys() - {FROM}:
            raise PieceError(
                f"a prompt is changed by {prompt.form.field} and, if it does not go to the end, "
                f"{FROM}; what else is to be said is said at its opening, or when it is finished."
            )
        form, piece, rest = found
        self._put(prompt, form, piece, rest.get(FROM))
        return prompt

    def finish(
        self, owner: str, prompt_id: str, body: object, now_s: float
    ) -> tuple[str, dict[str, object]]:
        """The route and the body of its request; it is not open any more. Raises PieceError."""
        prompt = self.find(owner, prompt_id, now_s)
        more = _object(body)
        found = _piece_in(more)
        if found is not None:
            form, piece, more = found
            self._put(prompt, form, piece, more.pop(FROM, None))
        elif more.get(FROM) is not None:
            raise PieceError(f"{FROM} says where a piece goes: send {prompt.form.field} with it.")
        self.drop(prompt)
        return prompt.form.path, prompt.request(more)

    def drop(self, prompt: Prompt) -> None:
        if self._prompts.pop(prompt.prompt_id, None) is not None:
            self._hold(prompt.owner, -1, -prompt.n_bytes)

    def ids(self) -> set[str]:
        return set(self._prompts)

    def forget_idle(self, now_s: float) -> None:
        """Those that nothing was sent of for too long."""
        while self._prompts:
            first = next(iter(self._prompts.values()))
            if first.touched_s > now_s - IDLE_S:
                return
            self.drop(first)

    def _put(self, prompt: Prompt, form: Form, piece: str | list[object], at: object) -> None:
        if form is not prompt.form:
            raise PieceError(f"this prompt was opened with {prompt.form.field}; go on with that.")
        before = prompt.content
        prompt.put(piece, at)
        try:
            # What is appended costs what it is long, not what all of it is.
            whole = prompt.n_bytes + _n_bytes(piece) if at is None else _n_bytes(prompt.request({}))
            self._account(prompt, whole)
        except PieceError:
            prompt.content = before
            raise
        prompt.version += 1

    def _account(self, prompt: Prompt, n_bytes: int, n_opened: int = 0) -> None:
        """`prompt` takes so many. Raises PieceError, and changes nothing, if that is too much."""
        more = n_bytes - prompt.n_bytes
        if self._held.get(prompt.owner, (0, 0))[1] + more > BYTES_EACH_MAX:
            raise PieceError(
                f"your open prompts would hold more than {BYTES_EACH_MAX >> 20} MiB; finish or "
                "delete some.",
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
        if self._n_bytes + more > BYTES_MAX:
            raise PieceError(
                "the server's memory for open prompts is full; send this one whole, or later.",
                HTTPStatus.SERVICE_UNAVAILABLE,
            )
        self._hold(prompt.owner, n_opened, more)
        prompt.n_bytes = n_bytes

    def _hold(self, owner: str, n_prompts: int, n_bytes: int) -> None:
        """The owner has so many more of both."""
        self._n_bytes += n_bytes
        had = self._held.pop(owner, (0, 0))
        has = had[0] + n_prompts, had[1] + n_bytes
        if has[0]:
            self._held[owner] = has


def _n_bytes(value: object) -> int:
    return len(json.dumps(value))


def _object(body: object) -> dict[str, object]:
    if not isinstance(body, Mapping):
        raise PieceError("the body must be a JSON object.")
    return dict(body)


def _piece_in(body: object) -> tuple[Form, str | list[object], dict[str, object]] | None:
    """(its form, the piece, the rest of the body); None if there is none. Raises PieceError."""
    said = _object(body)
    given = [form for form in FORMS if said.get(form.field) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise PieceError(f"only one of {_NAMES} may be given.")
    form = given[0]
    piece = cast("Any", said[form.field])
    of_ids = isinstance(piece, list) and all(type(token) is int for token in piece)
    fits = {
        "messages": isinstance(piece, list) and all(isinstance(one, Mapping) for one in piece),
        "input_ids": of_ids,
        "text": isinstance(piece, str),
        "prompt": isinstance(piece, str) or of_ids,
    }
    if not fits[form.field]:
        raise PieceError(
            f"{form.field} of a prompt in pieces must be that of one request, not of a batch."
        )
    return form, piece, {key: value for key, value in said.items() if key != form.field}
