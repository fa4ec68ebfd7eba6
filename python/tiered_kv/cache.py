"""Acts on the KV of a prompt or a session of a running server: `python -m tiered_kv.cache`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tiered_kv.administration import key_of, text_of, url_of
from tiered_kv.api.cache_order import TIERS
from tiered_kv.core.errors import ConfigError, TieredKVError

PATH = "/tiered_kv/cache"
#: Longer than the server lets an order take.
TIMEOUT_S = 150.0
EXIT_ERROR = 2
KEY_VARIABLE = "TIERED_KV_ADMIN_KEY"

DESCRIPTION = """\
Look at, or act on, what a server with --tiered-kv has cached of one prompt or one session.

  inspect    how many of its tokens lie on device, host, disk and in a shared store, who uses
             them, what is kept until when, and when they are expected to be needed next
  prefetch   bring it to host memory, or on to the device as far as there is room
  keep       have it stay in host memory and on disk, or on disk, for some seconds
  demote     take it out of the device and host memory; what lies farther down is written first
  drop       forget it in all tiers, and in the shared store what this server wrote there

A prompt is its text, its chat messages or its token ids; to demote or drop one takes along
all that goes on from it in memory, such as its answers and later turns. What a running
request uses, and what other prompts begin with as well, stays, and is counted.
"""
EXAMPLES = """\
examples:
  python -m tiered_kv.cache inspect --text "Once upon a time"
  python -m tiered_kv.cache prefetch --messages tomorrow.json --tier device
                                         a chat, as the server's chat template renders it
  python -m tiered_kv.cache keep --file manual.txt --seconds 1800
  python -m tiered_kv.cache keep --file manual.txt --seconds 0     keep it no longer
  python -m tiered_kv.cache demote --session agent-7
  python -m tiered_kv.cache drop --session agent-7 --tenant blue --url http://10.0.0.5:30000
  TIERED_KV_ADMIN_KEY=... python -m tiered_kv.cache drop --text "..." --json

A server with an --admin-api-key wants it: by --admin-key-file, or in the environment. What
the server allows is for --tiered-kv-view and --tiered-kv-keep-seconds in its --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Give one order; returns the exit status (0 done, 2 not)."""
    options = parser().parse_args(arguments)
    try:
        key = key_of("--admin-key-file", options.admin_key_file, KEY_VARIABLE)
        done = send(options.url, _body(options), key)
    except TieredKVError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ERROR
    sys.stdout.write(json.dumps(done, indent=1) + "\n" if options.json else table(done))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.cache",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("action", choices=list(TIERS), help="what is to be done")
    add("--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    add(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the server's --admin-api-key; or put the key into {KEY_VARIABLE}",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="a prompt, as /generate takes it")
    what.add_argument("--file", type=Path, help="the same, from a file")
    what.add_argument(
        "--messages", type=Path, metavar="FILE", help="a chat: a JSON list of messages, or a body"
    )
    what.add_argument("--token-ids", type=Path, metavar="FILE", help="a JSON list of token ids")
    what.add_argument("--session", metavar="ID", help="all that this session's calls ended with")
    add(
        "--tier",
        choices=("device", "host", "disk"),
        help="how near (prefetch: host or device), "
        "where (keep: host or disk), how far (demote: disk or host); the first is the default",
    )
    add("--seconds", type=float, metavar="S", help="keep: for so long; 0: no longer")
    add("--tenant", help="whose session, or for whom something is kept")
    add("--lora", metavar="NAME", help="the prompt's adapter")
    add("--cache-salt", metavar="SALT", help="the prompt's cache_salt")
    add("--extra-key", metavar="KEY", help="the prompt's extra_key")
    add("--json", action="store_true", help="print the answer as it came")
    return parser


def _body(options: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {
        "action": options.action,
        "text": options.text,
        "session_id": options.session,
        "tier": options.tier,
        "seconds": options.seconds,
        "tenant": options.tenant,
        "lora_path": options.lora,
        "cache_salt": options.cache_salt,
        "extra_key": options.extra_key,
    }
    if options.file is not None:
        body["text"] = text_of("--file", options.file)
    if options.token_ids is not None:
        body["token_ids"] = _read_json("--token-ids", options.token_ids)
    if options.messages is not None:
        messages = _read_json("--messages", options.messages)
        if isinstance(messages, dict):  # a request's body
            named = ("messages", "tools", "chat_template_kwargs")
            body |= {name: messages.get(name) for name in named}
        else:
            body["messages"] = messages
    return {name: value for name, value in body.items() if value is not None}


def _read_json(option: str, path: Path) -> Any:
    try:
        return json.loads(text_of(option, path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {path} is no JSON: {error}.") from None


class NotDoneError(TieredKVError):
    """One sentence: why the order was not carried out."""


def send(
    url: str,
    body: dict[str, Any],
    key: str | None = None,
    transport: httpx.BaseTransport | None = None,
) -> dict[str, Any]:
    """The server's answer. Raises ConfigError or NotDoneError.

    transport: in place of the network, for tests.
    """
    url = url_of(url)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(headers=headers, timeout=TIMEOUT_S, transport=transport) as client:
            response = client.post(url + PATH, json=body)
    except httpx.TimeoutException:
        raise NotDoneError(
            f"{url} has not answered within {TIMEOUT_S:.0f} s; it is overloaded or hangs."
        ) from None
    except httpx.HTTPError as error:
        raise NotDoneError(
            f"No server answers at {url} ({type(error).__name__}); start it, or give another --url."
        ) from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code != httpx.codes.OK:
        raise NotDoneError(_refused(url, response.status_code, answer))
    if not isinstance(answer, dict) or "tiers" not in answer:
        raise NotDoneError(
            f"What answers at {url} is no SGLang server with --tiered-kv; give another --url."
        )
    return answer


def _refused(url: str, status: int, answer: object) -> str:
    if status == httpx.codes.UNAUTHORIZED:
        return (
            f"{url} wants its administrator's key; give it by --admin-key-file or in "
            f"{KEY_VARIABLE}."
        )
    sentence = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(sentence, str) and sentence:
        return sentence
    if status in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED):
        return f"{url} takes no such orders; start it with --tiered-kv, of a release that has them."
    return f"{url} answers with HTTP {status}; see its log."


def table(done: dict[str, Any]) -> str:
    """The answer for terminals; the last line ended."""
    did = done.get("done", {})
    prompts = "one prompt" if done["prompts"] == 1 else f"{done['prompts']} prompts"
    replicas = f", on {done['replicas']} replicas" if done["replicas"] > 1 else ""
    lines = [f"{done['action']}: {done['tokens']:,} tokens of {prompts}{replicas}", ""]
    lines.append(f"{'tier':<10}{'tokens now':>12}" + (f"{_did(done):>14}" if did else ""))
    for tier, n_tokens in done["tiers"].items():
        own = f"{did[tier]:>14,}" if tier in did else ""
        kept = done["kept"].get(tier)
        stays = f"  {kept['tokens']:,} kept for {kept['ends_in_s']:,.0f} s" if kept else ""
        lines.append(f"{tier:<10}{n_tokens:>12,}{own}{stays}".rstrip())
    lines.append(f"{'nowhere':<10}{done['nowhere']:>12,}")
    notes = (
        ("in_use", "in use by requests or transfers"),
        ("shared", "left: other prompts begin with them, too"),
        ("unwritten", "left: no tier farther down has them"),
        ("beyond_bounds", "not kept: more than the server's bounds allow"),
        ("below", "go on from there"),
    )
    lines += [f"{done[name]:,} tokens {what}" for name, what in notes if done.get(name)]
    if done["next_use_s"] is not None:
        chance = f"{done['next_use_probability']:.0%}"
        lines.append(f"expected to be needed in {done['next_use_s']:,.0f} s ({chance} sure)")
    return "\n".join(lines) + "\n"


def _did(done: dict[str, Any]) -> str:
    words = {"prefetch": "brought", "keep": "kept", "demote": "taken out", "drop": "forgotten"}
    return words[done["action"]]


if __name__ == "__main__":
    sys.exit(main())
