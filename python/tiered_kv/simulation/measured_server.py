"""A server that was measured: what `benchmark/simulation/measure.py` wrote, for simulations."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import ModelSpec, find_model
from tiered_kv.scheduler.cost_model import EdgeCost
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.simulation.settings import DiskSpec, InstanceSettings

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredServer:
    """One model on one machine, as a running server was seen by its clients."""

    host: str
    """The machine, in words."""
    model: str
    """Name of a model preset."""
    element_bytes: float
    """Of an element of weights and KV."""
    times: PassTimes
    """Forward passes."""
    request_overhead_s: float
    """What a client sees of a request beside forward passes and waiting: HTTP, detokenising."""
    host_link: EdgeCost | None = None
    """Between host and device, either way; None: not measured."""
    disk: DiskSpec | None = None
    """None: not measured."""

    def model_spec(self) -> ModelSpec:
        """The model, with the sizes it is served with."""
        return replace(
            find_model(self.model),
            weight_bytes_per_parameter=self.element_bytes,
            kv_bytes_per_element=self.element_bytes,
        )

    def applied_to(self, settings: InstanceSettings) -> InstanceSettings:
        """`settings` with this model and these times; sizes and policies stay.

        Raises ConfigError without a size for the KV pool: the machine's memory says nothing of it.
        """
        if settings.cache.device_bytes is None:
            raise ConfigError(
                "A measured server needs the size of its KV pool; give it, as --device-kv 200MB."
            )
        device, cache = replace(settings.device, name=self.host), settings.cache
        if self.host_link is not None:
            device = replace(
                device,
                host_link_bandwidth=self.host_link.bandwidth,
                host_link_latency_s=self.host_link.latency_s,
            )
        if self.disk is not None:
            cache = replace(cache, disk=self.disk)
        return replace(
            settings,
            model=self.model_spec(),
            device=device,
            cache=cache,
            pass_times=self.times,
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> MeasuredServer:
        """Raises ConfigError for a document of another kind."""
        if document.get("schema") != SCHEMA:
            raise ConfigError(
                f"The measurements follow schema {document.get('schema')}, not {SCHEMA}; measure "
                "anew."
            )
        try:
            link, disk = document["host_link"], document["disk"]
            return cls(
                host=document["host"],
                model=document["model"],
                element_bytes=float(document["element_bytes"]),
                times=PassTimes(**document["times"]),
                request_overhead_s=float(document["request_overhead_s"]),
                host_link=EdgeCost(**link) if link else None,
                disk=DiskSpec(**disk) if disk else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"These are no measurements of a server ({error}); make them with "
                "benchmark/simulation/measure.py."
            ) from None


def read_measured_server(path: Path) -> MeasuredServer:
    """The measurements in a file. Raises ConfigError."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as measurements ({error}).") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no measurements of a server.")
    return MeasuredServer.from_json(document)
