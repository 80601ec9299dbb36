"""The manifests rendered by kustomize, as Kubernetes gets them, and the environment of every container."""

from __future__ import annotations

import base64
import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from loray.spec.fields import parse_size
from tests.conftest import REPOSITORY

KUBERAY = REPOSITORY / "infra" / "kuberay"
CRDS = Path(__file__).parent / "crds"
SERVICES = ("base", "overlays/cpu-dev", "overlays/gpu")
# The config.json of the base that a job's pods add and that is no preset.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1_000_000,
}
JOBS = ("train", "overlays/gpu-train")
# Secrets that people make of these files.
EXAMPLES = {"loray": "secret.env", "loray-database": "database.env", "loray-training": "training.env"}

Document = dict[str, Any]
_VARIABLE = re.compile(r"\$\((\w+)\)")


class Pod(NamedTuple):
    """A pod template in `document`: of a Ray group, a StatefulSet or a submitter."""

    document: Document
    labels: dict[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def is_ours(self) -> bool:
        return all(is_our_image(c["image"]) for c in self.containers)


def is_our_image(image: str) -> bool:
    return image.partition(":")[0] == "loray"


@functools.cache
def render(folder: str) -> tuple[Document, ...]:
    """Every object of a folder below infra/kuberay, rendered without a cluster. Callers share the objects and must not
    change them.
    """
    kubectl = Path(sys.executable).parent / "kubectl"
    rendered = subprocess.run(
        [kubectl, "kustomize", str(KUBERAY / folder)], capture_output=True, text=True, check=False
    )
    assert rendered.returncode == 0, rendered.stderr
    return tuple(yaml.safe_load_all(rendered.stdout))


def the(kind: str, folder: str) -> Document:
    """The only object of this kind in the folder."""
    (document,) = (d for d in render(folder) if d["kind"] == kind)
    return document


def pods(folder: str) -> list[Pod]:
    return [Pod(d, labels, spec) for d in render(folder) for labels, spec in _templates(d)]


def _templates(part: Any) -> Iterator[tuple[dict[str, str], Document]]:
    if isinstance(part, list):
        for item in part:
            yield from _templates(item)
    elif isinstance(part, dict):
        spec = part.get("spec")
        if isinstance(spec, dict) and "containers" in spec:
            yield part.get("metadata", {}).get("labels", {}), spec
        else:
            for item in part.values():
                yield from _templates(item)


def cluster_spec(document: Document) -> Document:
    """The RayCluster's spec in a RayService or a RayJob."""
    spec: Document = document["spec"].get("rayClusterConfig") or document["spec"]["rayClusterSpec"]
    return spec


def offered(group: Document) -> dict[str, float]:
    """The resources of one's own that a group's nodes offer, as the shell and then Ray read them."""
    (text,) = shlex.split(group["rayStartParams"].get("resources", "{}"))
    offered: dict[str, float] = json.loads(text)
    return offered


def data(kind: str, name: str, folder: str) -> dict[str, str]:
    """Values of a ConfigMap or Secret in the folder or in that of the service, which jobs use too. A Secret that is in
    neither has the keys of the example.
    """
    for document in (*render(folder), *render("base")):
        if (document["kind"], document["metadata"]["name"]) == (kind, name):
            values: dict[str, str] = document["data"]
            return {k: base64.b64decode(v).decode() for k, v in values.items()} if kind == "Secret" else values
    if kind == "Secret" and name in EXAMPLES:
        text = (KUBERAY / f"{EXAMPLES[name]}.example").read_text()
        lines = (line for line in text.splitlines() if "=" in line and line[0] != "#")
        names = [line.partition("=")[0] for line in lines]
        return {name: "0" * 64 if name.endswith("_SHA256") else "secret" for name in names}
    raise AssertionError(f"{folder} refers to the {kind} {name}, which nothing makes")


def development_key() -> str:
    """The administrator's key of the overlay for development, from its comment."""
    found = re.search(r"of the key (sk-lr-\S+)", (KUBERAY / "overlays/cpu-dev/kustomization.yaml").read_text())
    assert found is not None
    return found[1]


def environment(container: Document, folder: str) -> dict[str, str]:
    """The container's environment as the kubelet makes it: sources first, then the variables in order, each of which
    may refer to those before it. A reference that cannot be expanded is an error here; what is optional is not there.
    """
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if key in source and not source[key].get("optional"):
                values |= data(kind, source[key]["name"], folder)
    for variable in container.get("env", ()):
        name = variable["name"]
        if "value" in variable:
            unknown = [v for v in _VARIABLE.findall(variable["value"]) if v not in values]
            assert not unknown, f"{name} uses {unknown}, which are not set before it"
            values[name] = _VARIABLE.sub(lambda m: values[m[1]], variable["value"])
        else:
            ((key, reference),) = variable["valueFrom"].items()
            kind = {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}[key]
            values[name] = data(kind, reference["name"], folder)[reference["key"]]
    return values


def ray_object(folder: str) -> dict[str, Any]:
    return the("RayService" if folder in SERVICES else "RayJob", folder)


def groups(folder: str) -> list[dict[str, Any]]:
    spec = cluster_spec(ray_object(folder))
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def bytes_of(quantity: str) -> int:
    size = parse_size(f"{quantity}B")
    assert isinstance(size, int)
    return size


def by_name(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (item,) = (i for i in items if i["name"] == name)
    return item
