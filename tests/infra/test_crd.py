"""The validator finds planted mistakes, with the pruned definitions and with KubeRay's, where those are present."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.infra.crd import Schemas, check, load_schemas
from tests.infra.manifests import CRDS, JOBS, SERVICES, render, the
from tests.infra.prune import KINDS, VERSION, write

FULL = Path(os.environ.get("KUBERAY_CRDS", REPOSITORY.parent / "shared" / "kuberay-crds"))
needs_full = pytest.mark.skipif(
    not FULL.is_dir(), reason=f"KubeRay's CRDs are not at {FULL}; KUBERAY_CRDS names their folder"
)
SOURCES = [pytest.param(CRDS, id="pruned"), pytest.param(FULL, id="full", marks=needs_full)]


FILES = sorted(f.name for f in CRDS.glob("*.yaml"))


@functools.cache
def schemas_of(folder: Path) -> Schemas:
    return load_schemas(folder / name for name in FILES)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("folder", [*SERVICES, *JOBS])
def test_what_ray_gets_is_valid(source: Path, folder: str) -> None:
    ours = [d for d in render(folder) if d["apiVersion"].startswith("ray.io/")]
    assert [d["kind"] for d in ours] == ["RayService" if folder in SERVICES else "RayJob"]
    assert check(ours[0], schemas_of(source)) == []


def at(document: Any, *path: str | int) -> Any:
    for key in path:
        document = document[key]
    return document


WORKER = ("spec", "rayClusterConfig", "workerGroupSpecs", 0)
CONTAINER = (*WORKER, "template", "spec", "containers", 0)
# Kind, place, key, wrong value (None: the key is removed), and the error.
MISTAKES: list[tuple[str, tuple[str | int, ...], str, Any, str]] = [
    ("RayService", WORKER, "maxReplicas", "4", ".maxReplicas: '4' is not of type 'integer'"),
    ("RayService", WORKER, "minReplicas", True, ".minReplicas: True is not of type 'integer'"),
    ("RayService", WORKER, "maxReplicas", 2**31, f".maxReplicas: {2**31} is greater than the maximum"),
    ("RayService", WORKER, "groupname", "workers", "('groupname' was unexpected)"),
    ("RayService", WORKER, "groupName", None, "'groupName' is a required property"),
    ("RayService", (*WORKER, "rayStartParams"), "num-cpus", 1, "1 is not of type 'string'"),
    ("RayService", ("spec", "rayClusterConfig", "authOptions"), "mode", "tokens", ".mode: 'tokens' is not one of"),
    ("RayService", ("spec",), "serveConfigV2", {"applications": []}, ".serveConfigV2: {'applications': []} is not of"),
    ("RayService", CONTAINER, "envfrom", [], "('envfrom' was unexpected)"),
    ("RayService", CONTAINER, "name", None, "'name' is a required property"),
    ("RayService", (*CONTAINER, "resources", "limits"), "cpu", 1.5, ".cpu: 1.5 is not of type 'integer', 'string'"),
    ("RayService", (*CONTAINER, "resources", "limits"), "memory", "8 GB", ".memory: '8 GB' does not match"),
    ("RayService", ("metadata",), "name", None, ".metadata.name: required"),
    ("RayJob", ("spec", "submitterPodTemplate", "spec"), "containers", None, "'containers' is a required property"),
    (
        "RayJob",
        ("spec",),
        "deletionStrategy",
        {"deletionRules": [{"policy": "A", "condition": {}}]},
        "'A' is not one of",
    ),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("kind", "path", "key", "value", "said"), MISTAKES)
def test_mistakes_are_found(
    source: Path, kind: str, path: tuple[str | int, ...], key: str, value: Any, said: str
) -> None:
    document = copy.deepcopy(the(kind, "base" if kind == "RayService" else "train"))
    target = at(document, *path)
    if value is None:
        del target[key]
    else:
        target[key] = value
    (error,) = check(document, schemas_of(source))
    assert said in error


@pytest.mark.parametrize("source", SOURCES)
def test_a_list_that_is_a_map_has_every_key_once(source: Path) -> None:
    document = copy.deepcopy(the("RayService", "base"))
    ports = at(document, *CONTAINER)["ports"]
    ports.append(dict(ports[0], protocol="TCP"))  # the default: the same key
    (error,) = check(document, schemas_of(source))
    assert "a second {'containerPort': 8000, 'protocol': 'TCP'}" in error


def test_another_version_or_kind_has_no_definition() -> None:
    document = the("RayService", "base")
    for changed in ({"apiVersion": "ray.io/v2"}, {"kind": "RayServices"}):
        assert check(document | changed, schemas_of(CRDS))[0].startswith("no definition of ")


def test_pruned_definitions_are_small_and_whole() -> None:
    assert schemas_of(CRDS).keys() == {(f"ray.io/{VERSION}", kind) for kind in KINDS}
    assert all((CRDS / name).stat().st_size < 60 << 10 for name in FILES)


@needs_full
def test_pruned_definitions_are_what_prune_makes(tmp_path: Path) -> None:
    for name in FILES:
        definition = yaml.load((FULL / name).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        write(definition, tmp_path / name, "v1.7.0")
        assert (tmp_path / name).read_text() == (CRDS / name).read_text()
