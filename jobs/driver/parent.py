"""The published adapter that a run goes on from: found, checked and fetched before any worker starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from jobs.workers.initial import InitialFiles
from loray.adapters.manifest import read_manifest, with_manifest
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.recipes.continued import continued
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.store import AdapterStore, open_store


class Parent(NamedTuple):
    """`spec` is the recipe with what it takes over; `context` is what the adapter was trained for, in tokens."""

    spec: TrainSpec
    files: InitialFiles
    context: int


def fetch_parent(spec: TrainSpec, base: BaseModel, catalog: Catalog, settings: Settings) -> Parent:
    """The adapter that `spec` goes on from, its `init_adapter`.

    Raises NotFoundError, BaseMismatch for an adapter of another base, and SpecError where the recipe trains another
    adapter.
    """
    from loray.adapters.checks.initial import check_initial  # imports torch, which other recipes do not need here
    from loray.adapters.peft_format import read_adapter

    assert spec.init_adapter is not None
    ref = catalog.resolve(spec.init_adapter)
    ref.check_base(base.name, base.fingerprint)
    with tempfile.TemporaryDirectory(prefix="loray-initial-") as scratch:
        folder = Path(scratch) / "adapter"
        AdapterStore(open_store(settings.store)).fetch(ref.digest, folder)
        manifest = read_manifest(folder)
        spec = continued(spec, manifest, ref.label, base.config)
        weights = with_manifest(read_adapter(folder, base.config), manifest, ref.label)
        check_initial(spec.adapter, weights, base.config, ref.label)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Parent(spec, InitialFiles(ref.digest, files), manifest.context_length)
