"""A published adapter in another form: VeRA as LoRA, published anew, or merged into its base, as a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loray.adapters.manifest import read_manifest, with_manifest
from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion
from loray.errors import BaseMismatch
from loray.publishing.publish import Destination, publish
from loray.spec import AdapterManifest, AdapterRef
from loray.store import AdapterStore

if TYPE_CHECKING:
    from loray.adapters.weights import AdapterWeights


def convert_to_lora(ref: AdapterRef, base: BaseModel, to: Destination) -> AdapterVersion:
    """Publish the VeRA adapter `ref` anew, as a LoRA of VeRA's rank in fp32.

    RoPE, context and what was measured are the old one's: it computes the same. UnsupportedError where it is not VeRA.
    """
    from loray.adapters.convert import save_lora, vera_to_lora

    with (
        _opened(ref, base, to.store) as (manifest, weights),
        tempfile.TemporaryDirectory(prefix="loray-convert-") as made,
    ):
        save_lora(vera_to_lora(weights, base.config), Path(made), base_name=base.name)
        return publish(
            Path(made),
            base,
            to,
            derived_from=ref.digest,
            rope_parameters=manifest.rope_parameters,
            context_length=manifest.context_length,
            original_context_length=manifest.original_context_length,
            evaluations=manifest.evaluations,
            licence=manifest.licence,
            description=manifest.description,
        )


def merge_into_base(
    ref: AdapterRef, folder: Path, *, base: BaseModel, store: AdapterStore, dtype: str | None = None
) -> None:
    """Write `ref` merged into `base` to the new `folder`, in `dtype` or the base's: see `adapters.merge`."""
    import torch

    from loray.adapters.merge import merge_adapter

    with _opened(ref, base, store) as (_, weights):
        merge_adapter(base, weights, folder, dtype=None if dtype is None else getattr(torch, dtype))


@contextmanager
def _opened(ref: AdapterRef, base: BaseModel, store: AdapterStore) -> Iterator[tuple[AdapterManifest, AdapterWeights]]:
    """Verified: the files by their hashes, the base by its fingerprint, VeRA's pair by its digest."""
    from loray.adapters.peft_format import read_adapter

    if ref.base_fingerprint != base.fingerprint:
        raise BaseMismatch(f"{ref.label} was trained on another base than {base.name!r}; add that one first")
    with tempfile.TemporaryDirectory(prefix="loray-convert-") as scratch:
        fetched = Path(scratch) / "adapter"
        store.fetch(ref.digest, fetched)
        manifest = read_manifest(fetched)
        weights = with_manifest(read_adapter(fetched, base.config), manifest, ref.label)
        yield manifest, weights
