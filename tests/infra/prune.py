"""Makes `tests/infra/crds/` from KubeRay's CustomResourceDefinitions: `python -m tests.infra.prune FOLDER RELEASE`.

Everything that decides whether an object is valid is kept. Descriptions, status, rules in CEL and volumes of storage
that Kubernetes has removed are dropped. Equal parts are written once and referred to, since a pod template occurs three
times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = ("RayService", "RayJob")
VERSION = "v1"
TARGET = Path(__file__).parent / "crds"
_KEPT = {
    *("additionalProperties", "default", "enum", "format", "items", "maxItems", "maxLength", "maximum"),
    *("minItems", "minLength", "minimum", "pattern", "properties", "required", "type"),
    *("x-kubernetes-embedded-resource", "x-kubernetes-int-or-string", "x-kubernetes-list-map-keys"),
    "x-kubernetes-preserve-unknown-fields",
}
_REMOVED = {
    *("awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "flexVolume", "flocker"),
    *("gcePersistentDisk", "gitRepo", "glusterfs", "photonPersistentDisk", "portworxVolume", "quobyte", "rbd"),
    *("scaleIO", "storageos", "vsphereVolume"),
}
_SHARED_SIZE = 100  # characters; a shorter part is repeated
_HEADER = "# From the CustomResourceDefinition of KubeRay {release} (Apache-2.0) by tests/infra/prune.py.\n"


def prune(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition with one version, and only with what decides about validity."""
    spec = definition["spec"]
    (version,) = (v for v in spec["versions"] if v["name"] == VERSION)
    schema = version["schema"]["openAPIV3Schema"]
    properties = {name: _pruned(part) for name, part in schema["properties"].items() if name != "status"}
    kept = {"type": "object", "properties": properties} | {k: schema[k] for k in ("required",) if k in schema}
    return {
        "apiVersion": definition["apiVersion"],
        "kind": definition["kind"],
        "metadata": {"name": definition["metadata"]["name"]},
        "spec": {
            "group": spec["group"],
            "names": spec["names"],
            "versions": [{"name": VERSION, "schema": {"openAPIV3Schema": kept}}],
        },
    }


def _pruned(schema: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key in sorted(_KEPT & schema.keys()):
        value = schema[key]
        if key == "properties":
            value = {name: _pruned(part) for name, part in value.items() if name not in _REMOVED}
        elif isinstance(value, dict) and key in ("items", "additionalProperties"):
            value = _pruned(value)
        kept[key] = value
    return kept


class _Dumper(yaml.SafeDumper):
    """Writes references to equal parts that are not small."""

    def ignore_aliases(self, data: Any) -> bool:
        return not isinstance(data, dict) or len(json.dumps(data)) < _SHARED_SIZE


def write(definition: dict[str, Any], target: Path, release: str) -> None:
    seen: dict[str, Any] = {}

    def shared(part: Any) -> Any:
        """Make equal dicts one object, which YAML writes once."""
        if isinstance(part, list):
            return [shared(x) for x in part]
        if not isinstance(part, dict):
            return part
        return seen.setdefault(json.dumps(part, sort_keys=True), {k: shared(v) for k, v in part.items()})

    text = yaml.dump(shared(prune(definition)), Dumper=_Dumper, width=120, sort_keys=False, default_flow_style=None)
    target.write_text(_HEADER.format(release=release) + text)


def main(folder: Path, release: str) -> None:
    for path in sorted(folder.glob("*.yaml")):
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if definition["spec"]["names"]["kind"] in KINDS:
            write(definition, TARGET / path.name, release)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
