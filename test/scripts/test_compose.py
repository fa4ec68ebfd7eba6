"""What Compose starts beside the workers finds what it is for. No container is started here."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
WORKERS = ("worker-1", "worker-2")


class ComposeLoader(yaml.SafeLoader):
    """Reads Compose's own `!reset`."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: None)


def services(name: str = "compose.yaml") -> dict[str, Any]:
    # A subclass of SafeLoader: nothing but plain data is made.
    document = yaml.load((DOCKER / name).read_text(), Loader=ComposeLoader)
    found: dict[str, Any] = document["services"]
    return found


def read(path: str) -> Any:
    return yaml.safe_load((DOCKER / path).read_text())


def mounts(service: str) -> dict[str, Path]:
    """Folders of docker/ by where they are in the container."""
    pairs = (volume.split(":")[:2] for volume in services()[service]["volumes"])
    return {inside: DOCKER / here for here, inside in pairs if here.startswith("./")}


def test_prometheus_asks_the_services_at_their_ports() -> None:
    jobs = {
        job["job_name"]: set(job["static_configs"][0]["targets"])
        for job in read("prometheus/prometheus.yml")["scrape_configs"]
    }
    flags = dict(itertools.pairwise(services()["gateway"]["command"]))
    assert jobs == {
        "workers": {f"{name}:30000" for name in WORKERS},
        "gateway": {f"gateway:{flags['--prometheus-port']}"},
    }
    for name in WORKERS:
        assert "--enable-metrics" in services()[name]["command"]
    # Docker may hand its own proxy to containers.
    passed_by = services()["prometheus"]["environment"]["NO_PROXY"].split(",")
    assert {t.split(":")[0] for targets in jobs.values() for t in targets} == set(passed_by)
    (rules,) = read("prometheus/prometheus.yml")["rule_files"]
    assert (mounts("prometheus")["/etc/prometheus"] / rules).exists()


def test_grafana_has_the_dashboard_and_its_source() -> None:
    found = mounts("grafana")
    provisioning = found["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert urlsplit(source["url"]).hostname in services()
    (provider,) = yaml.safe_load((provisioning / "dashboards/tiered_kv.yaml").read_text())[
        "providers"
    ]
    folder = found[provider["options"]["path"]]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    dashboard = json.loads((folder / Path(home).name).read_text())
    (chosen,) = [v for v in dashboard["templating"]["list"] if v["name"] == "datasource"]
    assert chosen["query"] == source["type"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_workers_share_the_store_that_is_there(name: str) -> None:
    for worker in WORKERS:
        flags = dict(itertools.pairwise(services(name)[worker]["command"]))
        (address,) = re.findall(r"\$\{STORE:-(.*)\}", flags["--tiered-kv-store"])
        host = urlsplit(address).hostname
        assert set(services()[host]["networks"]) <= set(services()[worker]["networks"])


def test_only_workers_reach_the_store() -> None:
    """It asks for no password."""
    (network,) = services()["store"]["networks"]
    others = set(services()) - {"store"}
    assert {n for n in others if network in services()[n].get("networks", ())} == set(WORKERS)
    assert "ports" not in services()["store"]


def test_what_is_published_is_for_this_machine_only() -> None:
    for name, service in services().items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_images_of_others_have_a_version() -> None:
    for name, service in services().items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+", service["image"]), name


def test_no_log_fills_the_disk() -> None:
    """Docker's own default keeps all of it."""
    for name, service in services().items():
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name
