"""Who may share KV: `cache_salt` and `extra_key`, as two parts, from any route to the scheduler.

SGLang takes the two on OpenAI's routes and joins them there without a separator; on its others it
takes `extra_key` alone or neither, and passes over what it does not know. So they are read from
the body of every request (`key_of_body`), named one by one, and travel as one text in `extra_key`,
the field that SGLang carries to the scheduler. There `parts_of` takes it apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from tiered_kv.api.fields import TermsError
from tiered_kv.forest.inputs import PromptKey
from tiered_kv.forest.key import TreeKey, namespace_hash

SALT, EXTRA_KEY = FIELDS = ("cache_salt", "extra_key")

SCOPE_KEY = "tiered_kv_tree"
"""Under which the key of an HTTP request's body waits in its ASGI scope."""

#: Mappings inside a body where clients put what their protocol has no field for: Vertex, Ollama.
_INNER = ("parameters", "options")
#: Where routes have their prompt or prompts.
_PROMPTS = ("prompt", "text", "input_ids", "input_embeds", "instances")
#: Characters of a salt that routers are told in words: the scheduler keeps them for each tree.
SALT_TEXT_MAX = 256
_KEY = re.compile(r"tiered-kv:([0-9a-f]{64}|-):([0-9a-f]{64}|-)")


class Key(str):
    """The text of one salt and one extra key. A type, so that no client can send one."""

    __slots__ = ("salt",)

    salt: str | None
    """The salt in words, unless it is a long one."""


Keys: TypeAlias = "Key | list[Key | None]"
"""The key of all prompts of a request, or one for each."""


def key_of(salt: str | None, extra_key: str | None) -> Key | None:
    """The key of a request that named these; an empty one counts as none, as in SGLang."""
    if not salt and not extra_key:
        return None
    names = (_name(part) for part in (salt, extra_key))
    key = Key("tiered-kv:" + ":".join("-" if name is None else name.hex() for name in names))
    key.salt = salt if salt and len(salt) <= SALT_TEXT_MAX else None
    return key


def parts_of(text: str | None) -> tuple[bytes | None, bytes | None]:
    """The names of salt and extra key in the text of a key, for `TreeKey`.

    Any other text came past the tokenizer manager, from a front end outside Python: as an
    extra key.
    """
    if not text:
        return None, None
    found = _KEY.fullmatch(text)
    if found is None:
        return None, _name(text)
    salt, extra_key = (None if part == "-" else bytes.fromhex(part) for part in found.groups())
    return salt, extra_key


def salted(salt: bytes | None, apart: str | None) -> bytes | None:
    """The name of a salt that came in a key's text, of one that came beside it, or of both.

    Beside a key that names it, it is the same one in words.
    """
    if not apart:
        return salt
    name = _name(apart)
    return name if salt is None or salt == name else namespace_hash(salt, apart)


def root_key(key: PromptKey | TreeKey | str | None, apart: str | None = None) -> TreeKey | None:
    """The tree of a lookup: `key` of a request that was named, else what it says and `apart`.

    apart: a salt in a field of its own, which the name of a request has in it.
    """
    if isinstance(key, PromptKey):
        return key.tree
    if isinstance(key, TreeKey) or (key is None and not apart):
        return key
    salt, extra_key = parts_of(key)
    return TreeKey(salt=salted(salt, apart), extra_key=extra_key)


def _name(part: str | None) -> bytes | None:
    """Of fixed size, so that long ones take no room in the scheduler."""
    return namespace_hash(part) if part else None


# -- bodies of HTTP requests ---------------------------------------------------------------------


def key_of_body(body: object) -> Keys | None:
    """What an HTTP request's body says about who may share its KV; None if nothing.

    Raises TermsError for what is no text, for lists that do not go with the prompts, and for
    fields where no route would look.
    """
    if not isinstance(body, Mapping):
        return None
    return keys_of(_found(body, SALT), _found(body, EXTRA_KEY), n_prompts_of(body))


def forget_unknown(body: object) -> None:
    """Takes out what SGLang would stumble over, once the key is known.

    It makes `parameters` arguments, and has a field for lists, but not for prompts without a salt.
    """
    if not isinstance(body, dict):
        return
    if isinstance(body.get("parameters"), dict):
        body["parameters"].pop(SALT, None)
    for field in FIELDS:
        if isinstance(body.get(field), list) and None in body[field]:
            del body[field]


def _found(body: Mapping[str, object], field: str) -> object:
    """A body's own field counts instead of an inner one: a gateway sets it, a client the other."""
    instances = body.get("instances")
    for instance in instances if isinstance(instances, list) else ():
        if isinstance(instance, Mapping) and field in instance:
            raise TermsError(f"{field} belongs into parameters, not into instances.")
    for holder in (body, *(body.get(name) for name in _INNER)):
        value = holder.get(field) if isinstance(holder, Mapping) else None
        if value is not None:
            return value
    return None


def n_prompts_of(request: Mapping[str, object]) -> int | None:
    """How many prompts it has, or None if it is no batch: one text, or one list of tokens."""
    for name in _PROMPTS:
        value = request.get(name)
        if value is None:
            continue
        rows = value if isinstance(value, list) else []
        first = rows[0] if rows else None
        if name == "input_embeds":  # a prompt is a list of vectors
            first = first[0] if isinstance(first, list) and first else None
        return len(rows) if isinstance(first, str | list | dict) else None
    return None


# -- keys ----------------------------------------------------------------------------------------


def keys_of(salt: object, extra_key: object, n_prompts: int | None) -> Keys | None:
    """The key, or the list of keys, of a request with these. Raises TermsError."""
    salts, extra_keys = (
        _texts(field, value, n_prompts)
        for field, value in zip(FIELDS, (salt, extra_key), strict=True)
    )
    if not isinstance(salts, list) and not isinstance(extra_keys, list):
        return key_of(salts, extra_keys)
    n = n_prompts or 0
    rows = [part if isinstance(part, list) else [part] * n for part in (salts, extra_keys)]
    return [key_of(*row) for row in zip(*rows, strict=True)]


def _texts(field: str, value: object, n_prompts: int | None) -> str | list[str | None] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TermsError(f"{field} must be a string, or a list of strings, one for each prompt.")
    if not all(one is None or isinstance(one, str) for one in value):
        raise TermsError(f"{field} must be a list of strings.")
    if n_prompts is None:
        raise TermsError(f"{field} must be a string, not a list, for a request with one prompt.")
    if len(value) != n_prompts:
        raise TermsError(f"{field} has {len(value)} strings for {n_prompts} prompts.")
    return value


# -- hooks ---------------------------------------------------------------------------------------


def put_key(obj: Any, request: Any) -> None:
    """Gives a `GenerateReqInput` that is not normalised yet its key as SGLang carries it.

    What the HTTP body said counts; without one, `extra_key` as the route or the engine's user set
    it, and the salt, where SGLang has a field for it; there it goes on in words as well. Raises
    TermsError.
    """
    scope = getattr(request, "scope", None)
    keys: Keys | None = scope.get(SCOPE_KEY) if isinstance(scope, dict) else None
    if keys is None:
        own, salt = obj.extra_key, getattr(obj, SALT, None)
        keys = own if _is_key(own) else keys_of(salt, own, n_prompts_of(_prompts_of(obj)))
    if hasattr(obj, SALT):
        setattr(obj, SALT, _in_words(keys))
    # Plain text: SGLang's message encoder takes no other.
    if isinstance(keys, list):
        obj.extra_key = ["" if key is None else str(key) for key in keys]
    else:
        obj.extra_key = None if keys is None else str(keys)


def _in_words(keys: Keys | None) -> str | list[str] | None:
    """The salts of `keys`, for SGLang's field of them; lists are of texts only, as there."""
    if isinstance(keys, list):
        return ["" if key is None else key.salt or "" for key in keys]
    return None if keys is None else keys.salt


def _prompts_of(request: Any) -> dict[str, object]:
    return {name: getattr(request, name, None) for name in _PROMPTS}


def _is_key(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, Key) for one in values)


def compute_extra_key(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    """AROUND `OpenAIServingBase._compute_extra_key`, which joins the two. Raises TermsError."""
    if not getattr(serving.tokenizer_manager.server_args, "tiered_kv", False):
        return original(serving, request)
    salt, extra_key = (getattr(request, field, None) for field in FIELDS)
    return keys_of(salt, extra_key, n_prompts_of(_prompts_of(request)))
