"""Ephemeral adapters: a trainer's weights of one step, in memory, as an adapter with a digest and without a name in the
catalog. See `spec.rollouts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime

from loray.adapters.manifest import ManifestDetails, describe_files, manifest_file, manifest_json
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
) -> tuple[AdapterRef, dict[str, bytes]]:
    """Describe the weights of `step` of `run`. `files`: PEFT's adapter_config.json and adapter_model.safetensors.
    Returns the reference `~RUN@STEP`, and the files with their manifest, as an engine loads them.

    Equal weights have equal digests at every step, since `created_at` is the run's start and the step is no part of the
    manifest. A folder of these files is published with its digest by `import_folder`. `parent`: digest of the adapter
    from which the run has started. Raises UnsupportedError, BaseMismatch or IntegrityError where the adapter cannot be
    served on `base`.
    """
    manifest = describe_files(files, base, ManifestDetails(parent=parent, created_at=created_at))
    canonical = manifest_json(manifest)
    ref = manifest.ref(hashlib.sha256(canonical).hexdigest(), f"{EPHEMERAL}{run}", step)
    return ref, {**files, AdapterManifest.FILE: manifest_file(canonical)}
