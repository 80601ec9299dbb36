"""Conversion of a published adapter: from VeRA to LoRA, published as a new adapter; merged into its base; as GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loray.adapters.manifest import ManifestDetails, read_manifest, with_manifest
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion
from loray.errors import ConflictError, SpecError
from loray.files import scratch_folder
from loray.publishing.publish import Destination, publish
from loray.spec import AdapterManifest, AdapterRef
from loray.store import AdapterStore

if TYPE_CHECKING:
    from loray.adapters.weights import AdapterWeights


def convert_to_lora(ref: AdapterRef, base: BaseModel, to: Destination) -> AdapterVersion:
    """Publish the VeRA adapter `ref` as a LoRA adapter of VeRA's rank, in fp32.

    It computes the same, so RoPE, context and evaluations are those of `ref`. Raises UnsupportedError where `ref` is
    not VeRA.
    """
    from loray.adapters.forms.convert import save_lora, vera_to_lora

    with _opened(ref, base, to.store) as (manifest, weights), scratch_folder() as made:
        save_lora(vera_to_lora(weights, base.config), made, base_name=base.name)
        if manifest.chat_template is not None:
            (made / AdapterManifest.TEMPLATE_FILE).write_bytes(manifest.chat_template.encode())
        details = ManifestDetails(
            derived_from=ref.digest,
            rope_parameters=manifest.rope_parameters,
            context_length=manifest.context_length,
            original_context_length=manifest.original_context_length,
            evaluations=manifest.evaluations,
            licence=manifest.licence,
            description=manifest.description,
            tool_parser=manifest.tool_parser,
        )
        return publish(made, base, to, details)


def merge_into_base(
    ref: AdapterRef,
    folder: Path,
    *,
    base: BaseModel,
    store: AdapterStore,
    dtype: str | None = None,
    as_trained: bool = False,
) -> None:
    """Write `base` with `ref` merged into it to the new `folder`, in `dtype` or its own: see `adapters.forms.merge`.

    `as_trained`: into the base as it was quantised while `ref` was trained. Raises SpecError where it was not.
    """
    import torch

    from loray.adapters.forms.merge import RoundedBase, merge_adapter

    with _opened(ref, base, store) as (manifest, weights):
        recipe, trained_on = manifest.recipe, None
        if as_trained:
            if recipe is None or recipe.quantization is None:
                raise SpecError(f"{ref.label} was not trained on a quantised base: leave out --as-trained")
            trained_on = RoundedBase(recipe.quantization, getattr(torch, recipe.chosen_dtype))
        kept = None if dtype is None else getattr(torch, dtype)
        merge_adapter(base, weights, folder, dtype=kept, trained_on=trained_on)


def save_as_gguf(ref: AdapterRef, path: Path, *, base: BaseModel, store: AdapterStore) -> None:
    """Write `ref` as GGUF-LoRA to the new file `path`: see `adapters.forms.gguf`."""
    from loray.adapters.forms.gguf import write_gguf

    if path.exists():
        raise ConflictError(f"{path} exists already; name a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(ref, base, store) as (_, weights):
        write_gguf(weights, base.config, path)


@contextmanager
def _opened(ref: AdapterRef, base: BaseModel, store: AdapterStore) -> Iterator[tuple[AdapterManifest, AdapterWeights]]:
    """Manifest and weights, verified: files by their hashes, the base by its fingerprint, VeRA's pair by its digest."""
    ref.check_base(base.name, base.fingerprint)
    with scratch_folder() as scratch:
        fetched = scratch / "adapter"
        store.fetch(ref.digest, fetched)
        manifest = read_manifest(fetched)
        weights = with_manifest(read_adapter(fetched, base.config), manifest, ref.label)
        yield manifest, weights
