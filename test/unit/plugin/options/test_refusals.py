"""Every rule of `refusals.py` against plain namespaces, as if SGLang's arguments.

Guarantee: each unsupported option alone is refused with one sentence that names it; the supported
ones are not.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from support_plugin import on_release
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import refusals
from tiered_kv.plugin.upstream.current import arguments


def prefill_graphs(backend: str) -> SimpleNamespace:
    """SGLang's resolved configuration of CUDA graphs."""
    return SimpleNamespace(prefill=SimpleNamespace(backend=backend))


@dataclasses.dataclass
class Arguments:
    """What the rules read, with SGLang's defaults."""

    tiered_kv: bool = True
    tiered_kv_host_size: str | None = None
    smg_grpc_mode: bool = False
    grpc_mode: bool = False
    grpc_port: int | None = None
    enable_unified_cache_external_linker: bool = False
    hicache_host_memory_mode: str = "cache"
    prefill_only_disable_kv_cache: bool = False
    attn_dp_size: int = 1
    mamba_max_states_per_path: int = -1
    enable_mamba_cache_stochastic_rounding: bool = False
    prefill_decode_interval: int | None = None
    model_path: str = "some-model"
    device: str = "cuda"
    page_size: int | None = 64
    chunked_prefill_size: int = 2048
    enable_hierarchical_cache: bool = True
    radix_cache_backend: str | None = None
    radix_eviction_policy: str = "lru"
    schedule_policy: str = "fcfs"
    speculative_algorithm: str | None = None
    decoupled_spec_role: str = "null"
    disaggregation_mode: str = "null"
    elastic_ep_backend: str | None = None
    dllm_algorithm: str | None = None
    kv_canary: str = "none"
    pp_size: int = 1
    dp_size: int = 1
    attn_cp_size: int = 1
    dcp_size: int = 1
    dwdp_size: int = 1
    enable_dp_attention: bool = False
    enable_prefill_cp: bool = False
    enable_pdmux: bool = False
    encoder_only: bool = False
    language_only: bool = False
    use_ray: bool = False
    disable_radix_cache: bool = False
    enable_lmcache: bool = False
    enable_flexkv: bool = False
    enable_hisparse: bool = False
    enable_unified_memory: bool = False
    enable_page_major_kv_layout: bool = False
    enable_session_radix_cache: bool = False
    enable_streaming_session: bool = False
    is_embedding: bool = False
    enable_return_routed_experts: bool = False
    enable_return_indexer_topk: bool = False
    enable_mixed_chunk: bool = False
    cuda_graph_config: Any = dataclasses.field(default_factory=lambda: prefill_graphs("breakable"))
    hicache_size: int = 0
    hicache_ratio: float = 2.0
    hicache_write_policy: str = "write_through"
    hicache_storage_backend: str | None = None
    hicache_storage_backend_extra_config: str | None = None
    hicache_storage_prefetch_policy: str = "timeout"
    hicache_host_memory_fraction: float | None = 0.8
    hicache_storage_prefetch_retry_poll_interval: float = 0.0
    hicache_storage_prefetch_retry_max_attempts: int = 0


REFUSED: dict[str, Any] = {
    "speculative_algorithm": "DFLASH",
    "decoupled_spec_role": "verifier",
    "attn_cp_size": 2,
    "dcp_size": 2,
    "dwdp_size": 2,
    "enable_prefill_cp": True,
    "elastic_ep_backend": "mooncake",
    "enable_pdmux": True,
    "encoder_only": True,
    "language_only": True,
    "use_ray": True,
    "disable_radix_cache": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "enable_hisparse": True,
    "enable_unified_memory": True,
    "enable_page_major_kv_layout": True,
    "enable_session_radix_cache": True,
    "enable_streaming_session": True,
    "dllm_algorithm": "LowConfidence",
    "is_embedding": True,
    "enable_return_routed_experts": True,
    "enable_return_indexer_topk": True,
    "schedule_policy": "dfs-weight",
    "kv_canary": "log",
    "radix_eviction_policy": "lfu",
    "radix_cache_backend": "flexkv",
    "page_size": 0,
    "hicache_size": 8,
    "hicache_ratio": 3.0,
    "hicache_write_policy": "write_back",
    "hicache_storage_backend": "file",
    "hicache_storage_backend_extra_config": "{}",
    "hicache_storage_prefetch_policy": "best_effort",
}


if not on_release.IS_0_5_17:
    REFUSED |= {
        "smg_grpc_mode": True,
        "grpc_port": 50051,
        "enable_unified_cache_external_linker": True,
        "hicache_host_memory_mode": "buffer_only",
        "prefill_only_disable_kv_cache": True,
        "mamba_max_states_per_path": 3,
        "enable_mamba_cache_stochastic_rounding": True,
        "prefill_decode_interval": 2,
        "disaggregation_mode": "prefill",
        "hicache_host_memory_fraction": 0.5,
        "hicache_storage_prefetch_retry_poll_interval": 7.0,
        "hicache_storage_prefetch_retry_max_attempts": 7,
    }


def one_sentence(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ";" in text, "what is wrong; what to do"
    return text


def test_defaults_are_accepted() -> None:
    refusals.check_server_args(Arguments())
    refusals.check_resolved(Arguments(radix_cache_backend="tiered_kv"))
    for graphs in ("tc_piecewise", "disabled"):
        refusals.check_resolved(Arguments(cuda_graph_config=prefill_graphs(graphs)))
    refusals.check_resolved(Arguments(device="cpu", cuda_graph_config=None))


@pytest.mark.parametrize(
    "supported",
    [
        {"enable_mixed_chunk": True},
        {"page_size": 1},
        {"page_size": 16},
        {"page_size": None},
        {"schedule_policy": "lpm"},
        {"device": "cpu"},
        {"chunked_prefill_size": -1},
    ],
    ids=str,
)
def test_supported_options_are_accepted(supported: dict[str, Any]) -> None:
    refusals.check_server_args(dataclasses.replace(Arguments(), **supported))


@pytest.mark.parametrize("name", REFUSED)
def test_each_unsupported_option_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        refusals.check_server_args(dataclasses.replace(Arguments(), **{name: REFUSED[name]}))
    assert "--" + name.replace("_", "-") in one_sentence(error)


def test_every_rule_has_a_case() -> None:
    for rule in refusals.SERVER_ARGS_RULES:
        cases = [n for n in REFUSED if rule.applies(Arguments(**{n: REFUSED[n]}))]
        assert cases, rule.subject
    assert set(refusals.HICACHE_OPTIONS) <= set(REFUSED)


@pytest.mark.parametrize(
    ("resolved", "words"),
    [
        ({"device": "npu"}, "this device"),
        ({"cuda_graph_config": prefill_graphs("full")}, "--cuda-graph-backend-prefill full"),
        ({"cuda_graph_config": prefill_graphs("novel")}, "--cuda-graph-backend-prefill full"),
        ({"chunked_prefill_size": 100}, "multiple of the page size"),
        ({"enable_hierarchical_cache": False}, "forbids a hierarchical cache"),
        ({"speculative_algorithm": "DSPARK"}, "--speculative-algorithm"),
    ],
    ids=str,
)
def test_what_sglang_resolves_is_checked_too(resolved: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        refusals.check_resolved(dataclasses.replace(Arguments(), **resolved))
    one_sentence(error)


def test_options_without_the_flag() -> None:
    refusals.check_options_need_flag(Arguments(tiered_kv=False))
    refusals.check_options_need_flag(Arguments(tiered_kv=True, tiered_kv_host_size="8GB"))
    with pytest.raises(ConfigError, match="--tiered-kv-host-size has no effect without"):
        refusals.check_options_need_flag(Arguments(tiered_kv=False, tiered_kv_host_size="8GB"))
    with pytest.raises(ConfigError, match="--radix-cache-backend tiered_kv is chosen by"):
        refusals.check_options_need_flag(
            Arguments(tiered_kv=False, radix_cache_backend="tiered_kv")
        )


@pytest.mark.parametrize("name", arguments.OTHER_CACHES + arguments.OTHER_FRONT_ENDS)
def test_what_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"unset {name}"):
        refusals.check_server_args(Arguments())


def test_buffers_with_less_memory_than_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1")
    with pytest.raises(ConfigError, match="larger than the memory behind them"):
        refusals.check_server_args(Arguments())
    refusals.check_server_args(Arguments(device="cpu"))


VISION = list(arguments.MULTIMODAL_MODELS)


def build_context(**facts: Any) -> SimpleNamespace:
    """A TreeCacheBuildContext's facts about a plain causal model, changed by `facts`."""
    model = {"is_multimodal": False, "is_encoder_decoder": False, "is_generation": True}
    context = {"is_hybrid_swa": False, "is_hybrid_ssm": False, "is_dsa": False}
    context["disable_radix_cache"] = False
    architectures = facts.pop("architectures", ["LlamaForCausalLM"])
    page_size = facts.pop("page_size", 64)
    args = SimpleNamespace(disaggregation_mode=facts.pop("disaggregation_mode", "null"))
    for name, value in facts.items():
        (model if name in model else context)[name] = value
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=architectures), **model)
    params = SimpleNamespace(
        page_size=page_size,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: "a pool"),
    )
    return SimpleNamespace(**context, model_config=config, params=params, server_args=args)


@pytest.mark.parametrize(
    "fact",
    [
        {"is_hybrid_swa": True},
        {"is_dsa": True},
        {"disable_radix_cache": True},
        {"is_multimodal": True, "architectures": ["Gemma3ForConditionalGeneration"]},
        {"is_multimodal": True, "architectures": [*VISION, "Another"]},
        {"is_multimodal": True, "architectures": VISION, "page_size": 8},
        {"is_multimodal": True, "architectures": VISION, "disaggregation_mode": "prefill"},
        {"is_encoder_decoder": True},
        {"is_generation": False},
    ],
    ids=str,
)
def test_unsupported_models_are_refused(fact: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        refusals.check_model(build_context(**fact))
    one_sentence(error)


@pytest.mark.parametrize("page_size", [9, 16, 64])
def test_models_whose_images_have_names_are_served(
    monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    if not VISION:
        pytest.skip("no such model is served on this release")
    seen: list[object] = []
    monkeypatch.setattr(refusals, "check_kv_pool", seen.append)
    facts = {"is_multimodal": True, "architectures": VISION[:1], "page_size": page_size}
    refusals.check_model(build_context(**facts))
    assert seen == ["a pool"]


def new_pool(cls: type, **attributes: Any) -> Any:
    """A pool without its buffers: the check reads the class and a few attributes."""
    pool = cls.__new__(cls)
    vars(pool).update(attributes)
    return pool


def test_only_pools_of_plain_rows_are_accepted() -> None:
    memory_pool = pytest.importorskip("sglang.srt.mem_cache.memory_pool")
    plain = {"dtype": "bfloat16", "kv_cache_layout": "nhd"}
    mha = new_pool(memory_pool.MHATokenToKVPool, **plain)
    mha.quant_method = memory_pool.UnquantizedKVCacheMethod()
    refusals.check_kv_pool(mha)
    refusals.check_kv_pool(new_pool(memory_pool.MLATokenToKVPool, dtype="bfloat16"))

    mha.quant_method = object()
    with pytest.raises(ConfigError, match="MHATokenToKVPool"):
        refusals.check_kv_pool(mha)
    hnd = new_pool(memory_pool.MHATokenToKVPool, **{**plain, "kv_cache_layout": "hnd"})
    hnd.quant_method = memory_pool.UnquantizedKVCacheMethod()
    with pytest.raises(ConfigError, match="layout hnd"):
        refusals.check_kv_pool(hnd)
    for name in ("DSATokenToKVPool", "MLATokenToKVPoolFP4", "PageMajorMHATokenToKVPool"):
        with pytest.raises(ConfigError, match=name):
            refusals.check_kv_pool(
                new_pool(getattr(memory_pool, name), dtype="bfloat16", kv_cache_layout="nhd")
            )
