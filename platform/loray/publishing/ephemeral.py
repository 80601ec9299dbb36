"""Ephemeral adapters: a trainer's weights of one step, in memory, as an adapter with a digest and without a name in the
catalog. See `spec.rollouts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime

from loray.adapters.manifest import (
    ManifestDetails,
    describe_files,
    hashes_of,
    manifest_file,
    manifest_json,
    parse_manifest,
)
from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from loray.bases.checkpoint import header_end
from loray.bases.registry import BaseModel
from loray.spec import EPHEMERAL, AdapterManifest, AdapterRef


def ephemeral(
    files: Mapping[str, bytes],
    base: BaseModel,
    *,
    run: str,
    step: int,
    created_at: datetime,
    parent: str | None = None,
    earlier: Mapping[str, bytes] | None = None,
) -> tuple[AdapterRef, dict[str, bytes]]:
    """Describe the weights of `step` of `run`. `files`: PEFT's adapter_config.json and adapter_model.safetensors.
    Returns the reference `~RUN@STEP`, and the files with their manifest, as an engine loads them.

    Equal weights have equal digests at every step, since `created_at` is the run's start and the step is no part of the
    manifest. A folder of these files is published with its digest by `import_folder`. `parent`: digest of the adapter
    from which the run has started. `earlier`: files that this has returned for another step of the run; where values
    alone differ, its manifest holds but for the hashes. Raises UnsupportedError, BaseMismatch or IntegrityError where
    the adapter cannot be served on `base`.
    """
    if earlier is not None and _differ_in_values(files, earlier):
        before = parse_manifest(earlier[AdapterManifest.FILE], source=f"{EPHEMERAL}{run}")
        manifest = before.model_copy(update={"files": hashes_of(files)})
    else:
        manifest = describe_files(files, base, ManifestDetails(parent=parent, created_at=created_at))
    canonical = manifest_json(manifest)
    ref = manifest.ref(hashlib.sha256(canonical).hexdigest(), f"{EPHEMERAL}{run}", step)
    return ref, {**files, AdapterManifest.FILE: manifest_file(canonical)}


def _differ_in_values(files: Mapping[str, bytes], earlier: Mapping[str, bytes]) -> bool:
    """Say whether configuration and tensors' names, shapes and dtypes are equal, of which the rest of a manifest is."""
    weights, before = files[WEIGHTS_FILE], earlier[WEIGHTS_FILE]
    end = header_end(weights, source=WEIGHTS_FILE)
    return files[CONFIG_FILE] == earlier[CONFIG_FILE] and weights[:end] == before[:end]
