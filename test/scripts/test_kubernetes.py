"""The manifests of docker/kubernetes render, and fit the schemas and each other."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from harness.gateway import compose_flags
from harness.kubernetes import OVERLAYS, container, manifest, manifests
from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.encryption import read_key_file

ROOT = Path(__file__).parents[2]
#: The oldest that is still supported by many providers, and the newest that there are schemas of.
VERSIONS = ("1.31", "1.37")
GIB = 1 << 30
PODS = (("StatefulSet", "worker"), ("Deployment", "gateway"), ("StatefulSet", "store"))
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def pod(overlay: str, kind: str, name: str) -> dict[str, Any]:
    template: dict[str, Any] = manifest(overlay, kind, name)["spec"]["template"]
    return template


def arguments(overlay: str) -> dict[str, str]:
    """A worker's flags and what follows each."""
    return dict(itertools.pairwise([*container(overlay, "StatefulSet", "worker")["args"], ""]))


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]+)", quantity).groups()  # type: ignore[union-attr]
    powers = {"Mi": 1 << 20, "Gi": GIB, "GB": 10**9, "MB": 10**6}
    return int(number) * powers[unit]


@each_overlay
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_its_schema(overlay: str, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    found = manifests(overlay)
    assert len(found) > 8
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validator_knows_a_mistake() -> None:
    document = manifest("cpu", "StatefulSet", "worker")
    wrong = yaml.safe_load(yaml.safe_dump(document).replace("readinessProbe", "readynessProbe"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@each_overlay
def test_a_worker_gets_flags_that_the_server_has(overlay: str, server_flags: set[str]) -> None:
    given = {
        word for word in container(overlay, "StatefulSet", "worker")["args"] if word[:2] == "--"
    }
    assert given <= server_flags
    assert {"--enable-metrics", "--tiered-kv-disk-key-file", "--admin-api-key"} <= given


@each_overlay
def test_the_gateway_has_the_flags_of_the_other_cluster(overlay: str) -> None:
    args = container(overlay, "Deployment", "gateway")["args"]
    flags = compose_flags()
    assert any(args[at : at + len(flags)] == flags for at in range(len(args)))


@each_overlay
def test_selectors_meet_the_pods_they_are_for(overlay: str) -> None:
    labels = {name: pod(overlay, kind, name)["metadata"]["labels"].items() for kind, name in PODS}
    for document in manifests(overlay):
        name, spec = document["metadata"]["name"], document.get("spec", {})
        wanted = spec.get("podSelector", spec.get("selector"))
        if wanted:
            wanted = wanted.get("matchLabels", wanted).items()
            assert [n for n in labels if wanted <= labels[n]] == [name], document["kind"]
    args = container(overlay, "Deployment", "gateway")["args"]
    at = args.index("--selector")
    asked = [tuple(word.split("=")) for word in args[at + 1 : at + 3]]
    assert set(asked) == set(labels["worker"])
    assert args[args.index("--service-discovery-port") + 1] == str(
        container(overlay, "StatefulSet", "worker")["ports"][0]["containerPort"]
    )


@each_overlay
def test_nobody_reaches_more_than_he_needs(overlay: str) -> None:
    """Every pod has a policy. Of a worker only its HTTP port is reached, by the gateway and by who
    scrapes it: the ports that Mooncake's client opens on all addresses are closed."""
    allowed = {
        (name, port["port"], who)
        for _, name in PODS
        for rule in manifest(overlay, "NetworkPolicy", name)["spec"]["ingress"]
        for port in rule["ports"]
        for who in (reached_by(source) for source in rule.get("from", [{}]))
    }
    assert allowed == {
        ("worker", "http", "gateway"),
        ("worker", "http", "monitoring"),
        ("gateway", "http", "anybody"),
        ("gateway", "metrics", "monitoring"),
        ("store", "valkey", "worker"),
    }
    for kind, name in PODS:
        assert manifest(overlay, "NetworkPolicy", name)["spec"]["policyTypes"] == ["Ingress"]
        names = {port["name"] for port in container(overlay, kind, name)["ports"]}
        assert {port for policy, port, _ in allowed if policy == name} <= names


def reached_by(source: dict[str, Any]) -> str:
    """The component or the namespace that a rule lets in."""
    if "podSelector" in source:
        labels = source["podSelector"]["matchLabels"]
        return str(labels["app.kubernetes.io/component"])
    if "namespaceSelector" in source:
        return str(source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
    return "anybody"


@each_overlay
def test_no_probe_computes_anything(overlay: str) -> None:
    worker = container(overlay, "StatefulSet", "worker")
    environment = {e["name"]: e.get("value") for e in worker["env"]}
    assert environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    for name in ("startupProbe", "readinessProbe"):
        assert worker[name]["httpGet"] == {"path": "/health", "port": "http"}
    # A draining server says 503, and must not be killed for it.
    assert worker["livenessProbe"]["tcpSocket"] == {"port": "http"}


@each_overlay
def test_a_worker_has_time_to_finish(overlay: str) -> None:
    spec = pod(overlay, "StatefulSet", "worker")["spec"]
    sleep = int(
        container(overlay, "StatefulSet", "worker")["lifecycle"]["preStop"]["exec"]["command"][1]
    )
    # Up to 25 s of its own; the rest is for requests.
    assert spec["terminationGracePeriodSeconds"] - sleep - 25 >= 180
    assert manifest(overlay, "PodDisruptionBudget", "worker")["spec"]["maxUnavailable"] == 1


@each_overlay
def test_the_tiers_fit_what_the_pod_may_have(overlay: str) -> None:
    """Memory: the host tier, 3.4 GB that were seen beside it, /dev/shm, 1 GiB left to all else."""
    flags = arguments(overlay)
    resources = container(overlay, "StatefulSet", "worker")["resources"]
    limit = bytes_of(resources["limits"]["memory"])
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    volumes = pod(overlay, "StatefulSet", "worker")["spec"]["volumes"]
    (shm,) = [v["emptyDir"]["sizeLimit"] for v in volumes if v["name"] == "shm"]
    used = bytes_of(flags["--tiered-kv-host-size"]) + int(3.4e9) + bytes_of(shm)
    assert used + GIB <= limit
    claims = manifest(overlay, "StatefulSet", "worker")["spec"]["volumeClaimTemplates"]
    (kv,) = [
        c["spec"]["resources"]["requests"]["storage"]
        for c in claims
        if c["metadata"]["name"] == "kv"
    ]
    assert bytes_of(flags["--tiered-kv-disk-size"]) < 0.95 * bytes_of(kv)


@each_overlay
def test_a_worker_writes_its_volumes_and_nothing_else(overlay: str) -> None:
    for kind, name in PODS:
        spec = pod(overlay, kind, name)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        for of in containers:
            assert of["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        names = {v["name"] for v in spec["volumes"]}
        claims = manifest(overlay, kind, name)["spec"].get("volumeClaimTemplates", [])
        names |= {claim["metadata"]["name"] for claim in claims}
        assert {mount["name"] for of in containers for mount in of["volumeMounts"]} == names
    # The images' --tiered-kv-disk-dir lies there.
    assert mounts(container(overlay, "StatefulSet", "worker"))["kv"] == "/var/lib/tiered_kv"


def mounts(of: dict[str, Any]) -> dict[str, str]:
    """Where each volume is in that container."""
    return {mount["name"]: mount["mountPath"] for mount in of["volumeMounts"]}


@each_overlay
def test_the_server_may_read_the_keys_and_nobody_else(overlay: str, tmp_path: Path) -> None:
    """The kubelet makes files of a secret readable by the pod's group, which the server refuses."""
    spec = pod(overlay, "StatefulSet", "worker")["spec"]
    (volume,) = [v for v in spec["volumes"] if "secret" in v]
    secret, keys = tmp_path / "secret", tmp_path / "keys"
    secret.mkdir()
    keys.mkdir()
    for item in volume["secret"]["items"]:
        (secret / item["path"]).write_text("5a" * 32)
        (secret / item["path"]).chmod(0o440)
        with pytest.raises(DiskTierError, match="may be used by others"):
            read_key_file(secret / item["path"])
    (copies,) = spec["initContainers"]
    here = {mounts(copies)["secret"]: secret, mounts(copies)["keys"]: keys}
    shell = re.sub("|".join(here), lambda found: str(here[found[0]]), copies["command"][-1])
    subprocess.run([*copies["command"][:-1], shell], check=True, timeout=30)
    flags = arguments(overlay)
    at = mounts(container(overlay, "StatefulSet", "worker"))["keys"]
    for flag in ("--tiered-kv-disk-key-file", "--tiered-kv-store-key-file"):
        assert flags[flag].startswith(f"{at}/")
        assert read_key_file(keys / Path(flags[flag]).name) == b"\x5a" * 32


@each_overlay
def test_the_store_is_where_the_workers_look_and_fits_its_memory(overlay: str) -> None:
    (port,) = manifest(overlay, "Service", "store")["spec"]["ports"]
    assert arguments(overlay)["--tiered-kv-store"] == f"valkey://store:{port['port']}"
    store = container(overlay, "StatefulSet", "store")
    (largest,) = [e["value"] for e in store["env"] if e["name"] == "MAXMEMORY"]
    held = int(largest.removesuffix("gb")) * GIB
    assert 1.1 * held <= bytes_of(store["resources"]["limits"]["memory"])


@each_overlay
def test_the_secret_that_the_page_makes_has_every_key(overlay: str) -> None:
    """docs/cluster.md has the command that makes it."""
    text = (ROOT / "docs/cluster.md").read_text()
    (command,) = re.findall(
        r"kubectl .*create secret generic tiered-kv (.*?)\n```", text, re.DOTALL
    )
    made = set(re.findall(r"--from-literal=([\w-]+)=", command))
    wanted = set()
    for kind, name in (("StatefulSet", "worker"), ("Deployment", "gateway")):
        sources = [e.get("valueFrom", {}) for e in container(overlay, kind, name)["env"]]
        for reference in (s["secretKeyRef"] for s in sources if "secretKeyRef" in s):
            assert reference["name"] == "tiered-kv"
            wanted |= set() if reference.get("optional") else {reference["key"]}
    for volume in pod(overlay, "StatefulSet", "worker")["spec"]["volumes"]:
        wanted |= {item["key"] for item in volume.get("secret", {}).get("items", [])}
    assert wanted == made
