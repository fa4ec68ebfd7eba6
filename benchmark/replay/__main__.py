"""The command `python -m benchmark.replay`, run in the root of the repository."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from tqdm import tqdm

from benchmark.replay.client import Client, Options, Prompt, ServerError
from benchmark.replay.driver import replay
from benchmark.replay.prompts import PromptError, PromptMaker, load_tokenizer
from benchmark.replay.records import SCHEMA, Record, summarise, table
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.errors import TieredKVError
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.simulation.spread import SpreadWorkload
from tiered_kv.simulation.workload.adapt import AdaptedWorkload
from tiered_kv.simulation.workload.catalog import add_arguments, from_arguments
from tiered_kv.simulation.workload.readers.chat_log import ChatLog
from tiered_kv.simulation.workload.request import Request, Workload


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.replay",
        description="Replays a workload against a server that speaks OpenAI's API and reports "
        "latencies, cached tokens and how many requests met their targets. Traces without texts "
        "get prompts made of words, equal for equal blocks and of the right length; this needs "
        "the served model's tokenizer.",
        epilog="Example: python -m benchmark.replay --url http://127.0.0.1:30000 --tokenizer MODEL "
        "--workload mooncake:trace.jsonl --length 1/16 --limit 200 --rate 0.5 --json out.json",
    )
    add_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:30000", help="without /v1 at the end")
    server.add_argument("--api-key", default="none", help="if the server wants one")
    server.add_argument("--model", help="name of the served model (default: the first it lists)")
    server.add_argument(
        "--tokenizer", type=Path, metavar="PATH",
        help="the served model's directory or tokenizer.json; not needed for chat_log",
    )  # fmt: skip
    server.add_argument("--chat", action="store_true", help="use the chat endpoint")
    server.add_argument(
        "--stop-at-eos", action="store_true",
        help="let the model end its answers; else the server is asked to ignore end tokens",
    )  # fmt: skip
    server.add_argument("--send-slo", action="store_true", help="send class, targets and priority")
    server.add_argument(
        "--body", type=_object, default={}, metavar="JSON", help="more fields for each request"
    )
    server.add_argument(
        "--cached-by-tier", action="store_true",
        help="ask SGLang for cached tokens by tier (it must run with --enable-cache-report)",
    )  # fmt: skip
    server.add_argument("--timeout-s", type=float, default=600.0, help="per request")
    loop = parser.add_argument_group("loop")
    loop.add_argument(
        "--in-flight", type=int, default=0, metavar="N",
        help="closed loop: ignore arrival times and keep N sessions under way (default: open)",
    )  # fmt: skip
    loop.add_argument(
        "--spread", type=float, default=0.0, metavar="S",
        help="delay each arrival by up to S seconds at random; 3 undoes the resolution of "
        "Mooncake's traces",
    )  # fmt: skip
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all records there")
    out.add_argument(
        "--cost-model", default="Llama-3.1-8B", metavar="PRESET", help="presets for the work done"
    )
    out.add_argument("--cost-device", default="H100-80", metavar="PRESET")
    out.add_argument(
        "--element-bytes", type=float, default=2.0, metavar="B",
        help="of weights and KV in the cost model (default 2)",
    )  # fmt: skip
    return parser


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write for example '{{}}'")
    return value


def _chat_log(workload: Workload) -> ChatLog | None:
    """The log behind a workload that has texts."""
    inner = workload.inner if isinstance(workload, AdaptedWorkload) else workload
    return inner if isinstance(inner, ChatLog) else None


def _spread(workload: Workload, chosen: argparse.Namespace) -> Workload:
    return SpreadWorkload(workload, chosen.spread, chosen.seed) if chosen.spread else workload


async def _prompts(
    chosen: argparse.Namespace, workload: Workload, client: Client
) -> Callable[[Request], Prompt]:
    log = _chat_log(workload)
    if log is not None:
        return lambda request: log.turns[request.request_id].messages
    if chosen.tokenizer is None:
        raise PromptError(
            "The workload has no texts, so prompts must be made; give --tokenizer the served "
            "model's directory."
        )
    maker = PromptMaker(load_tokenizer(chosen.tokenizer), workload.block_tokens, chosen.seed)
    overhead = await client.overhead_tokens(maker)
    for request, _ in zip(workload.initial(), range(3), strict=False):
        maker.check(request, overhead)
    return lambda request: maker.text(request, overhead)


def is_local(url: str) -> bool:
    """Whether `url` names this machine by its loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _run(chosen: argparse.Namespace, workload: Workload) -> list[Record]:
    async with AsyncOpenAI(
        base_url=f"{chosen.url.rstrip('/')}/v1",
        api_key=chosen.api_key,
        max_retries=0,
        timeout=chosen.timeout_s,
        # A proxy that the environment names would not find a server on this machine.
        http_client=DefaultAsyncHttpxClient(trust_env=not is_local(chosen.url)),
    ) as connection:
        model = chosen.model or await _first_model(connection)
        body = dict(chosen.body)
        if chosen.cached_by_tier:
            body["return_cached_tokens_details"] = True
        client = Client(
            connection,
            Options(
                model=model,
                chat=chosen.chat,
                ignore_eos=not chosen.stop_at_eos,
                send_slo=chosen.send_slo,
                body=body,
            ),
        )
        prompt_of = await _prompts(chosen, workload, client)
        with tqdm(desc="answered", unit=" requests") as bar:

            def advance(_: Record) -> None:
                bar.update()

            return await replay(
                _spread(workload, chosen),
                client.send,
                prompt_of,
                in_flight=chosen.in_flight,
                done=advance,
            )


async def _first_model(connection: AsyncOpenAI) -> str:
    try:
        listed = await connection.models.list()
    except OpenAIError as error:
        raise ServerError(
            f"No server answers at {connection.base_url} ({error}); start one or correct --url."
        ) from None
    if not listed.data:
        raise ServerError(f"{connection.base_url} serves no model; name one with --model.")
    return str(listed.data[0].id)


def _cost_model(chosen: argparse.Namespace) -> CostModel:
    model = replace(
        find_model(chosen.cost_model),
        weight_bytes_per_parameter=chosen.element_bytes,
        kv_bytes_per_element=chosen.element_bytes,
    )
    return CostModel(model, find_device(chosen.cost_device), {})


def _settings(chosen: argparse.Namespace) -> dict[str, Any]:
    hidden = {"api_key", "json"}
    return {key: str(value) for key, value in vars(chosen).items() if key not in hidden}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.in_flight < 0 or chosen.spread < 0:
        _parser().error("--in-flight and --spread must be at least 0")
    try:
        cost = _cost_model(chosen)
        workload = from_arguments(chosen)
        records = asyncio.run(_run(chosen, workload))
    except TieredKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = summarise(records, cost)
    print(table(summary))
    for record in [record for record in records if record.error][:3]:
        print(f"request {record.request_id} failed: {record.error}", file=sys.stderr)
    if chosen.json:
        result = {
            "schema": SCHEMA,
            "workload": workload.name,
            "settings": _settings(chosen),
            "summary": summary,
            "records": [asdict(record) for record in records],
        }
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
