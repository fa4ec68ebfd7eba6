"""Watches a server that is starting: shows that time passes, and, once it answers, how to ask it.

Standard library only, so that it starts at once. Ends when the server answers or is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import ssl
import sys
import time
import urllib.error
import urllib.request

POLL_S = 0.5
REPORT_EVERY_S = 10
QUESTION = "What is the capital of France?"


def say(text: str) -> None:
    print(f"[serve] {text}", file=sys.stderr, flush=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def get(url: str, api_key: str | None) -> bytes | None:
    """The body of a 200, else None. The server is on this machine: no proxy is asked."""
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
    )
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with opener.open(request, timeout=30) as answer:
            body: bytes = answer.read()
            return body
    except (urllib.error.URLError, OSError):
        return None


def model_name(url: str, api_key: str | None) -> str | None:
    body = get(f"{url}/v1/models", api_key)
    if body is None:
        return None
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return None


def curl_line(url: str, model: str, api_key: str | None) -> str:
    question = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
    }
    words = ["curl", "-s", "--noproxy", "*"]
    if url.startswith("https"):
        words.append("-k")
    words += [f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if api_key:
        words += ["-H", f"Authorization: Bearer {api_key}"]
    return shlex.join([*words, "-d", json.dumps(question)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--api-key")
    arguments = parser.parse_args()

    start = time.monotonic()
    next_report = REPORT_EVERY_S
    while get(f"{arguments.url}/health", arguments.api_key) is None:
        if not alive(arguments.pid):
            say("the server ended before it was ready; the reason is in its output above")
            return 1
        waited = time.monotonic() - start
        if waited >= next_report:
            say(f"still starting, {waited:.0f} s so far")
            next_report += REPORT_EVERY_S
        time.sleep(POLL_S)

    say(f"ready after {time.monotonic() - start:.0f} s at {arguments.url}")
    model = model_name(arguments.url, arguments.api_key)
    if model is not None:
        line = curl_line(arguments.url, model, arguments.api_key)
        say(f"try this; Ctrl-C here stops the server:\n\n{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
