"""The model that `loray eval` measures: a base, a published adapter, or a folder saved by PEFT."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loray.adapters.manifest import verify_folder
from loray.bases.registry import BaseModel, get_base, list_bases
from loray.bases.rope import scaled
from loray.catalog import AdapterVersion
from loray.cli.services import open_services
from loray.errors import AdapterNotFound, DataError, SpecError, UnsupportedError
from loray.publishing import base_of
from loray.settings import Settings
from loray.spec import AdapterManifest, RopeParameters, RopeScaling


@dataclass(frozen=True, slots=True)
class Target:
    """The model to measure. With `rope` None, RoPE and `context_length` are the base's. `version`: if published."""

    label: str
    base: BaseModel
    context_length: int
    original_context_length: int | None = None
    rope: RopeParameters | None = None
    adapter: Path | None = None
    version: AdapterVersion | None = None

    @property
    def default_context_lengths(self) -> tuple[int, ...]:
        """The lengths that the gate compares: the original context, and the extended one."""
        original = () if self.original_context_length is None else (self.original_context_length,)
        return (*original, self.context_length)

    def described(self, manifest: AdapterManifest) -> Target:
        """Adds context lengths and RoPE of the adapter's manifest."""
        return replace(
            self,
            context_length=manifest.context_length,
            original_context_length=manifest.original_context_length,
            rope=manifest.rope_parameters,
        )


@contextmanager
def opened(
    model: str, *, base_name: str | None, scaling: RopeScaling | None, original_context: int | None
) -> Iterator[Target]:
    """Opens the target. A published adapter's files are fetched, verified, and removed when the block ends.

    A `model` with a slash is a path (`./folder`); otherwise it is the name of a base or, if there is none, of an
    adapter. `scaling` scales the RoPE of a model that has none of its own. Raises BaseNotFound, AdapterNotFound,
    DataError, SpecError and what reading raises.
    """
    settings = Settings.from_env()
    if os.sep in model:
        yield _scaled(_folder(Path(model).expanduser(), settings, base_name), scaling, original_context)
        return
    if base_name is not None:
        raise SpecError("--base is for folders: a published adapter names its base")
    if model in {base.name for base in list_bases(settings.home)}:
        base = get_base(settings.home, model)
        target = Target(model, base, base.config.max_position_embeddings)
        yield _scaled(target, scaling, original_context)
        return
    with _published(model) as target:
        yield _scaled(target, scaling, original_context)


def _folder(folder: Path, settings: Settings, base_name: str | None) -> Target:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    base = get_base(settings.home, base_name) if base_name else base_of(folder, settings.home)
    target = Target(folder.name, base, base.config.max_position_embeddings, adapter=folder)
    return target.described(verify_folder(folder)) if (folder / AdapterManifest.FILE).is_file() else target


@contextmanager
def _published(model: str) -> Iterator[Target]:
    with open_services() as services:
        try:
            ref = services.catalog.resolve(model)
        except AdapterNotFound as e:
            raise AdapterNotFound(
                f"{e}; `loray base ls` lists bases, and a folder is named by a path: ./{model}"
            ) from e
        version = services.catalog.version(ref.name, ref.version)
        with tempfile.TemporaryDirectory(prefix="loray-eval-") as scratch:
            folder = Path(scratch) / "adapter"
            services.store.fetch(ref.digest, folder)
            base = base_of(folder, services.settings.home)
            target = Target(version.label, base, base.config.max_position_embeddings, adapter=folder, version=version)
            yield target.described(version.manifest)


def _scaled(target: Target, scaling: RopeScaling | None, original_context: int | None) -> Target:
    if scaling is None:
        if original_context is not None:
            raise SpecError("--original-context says what --rope extends; give that too")
        return target
    if target.rope is not None or target.version is not None:
        raise SpecError(f"{target.label} is published with its RoPE; --rope is for bases and for folders without one")
    original = original_context or target.base.config.max_position_embeddings
    try:
        rope = scaled(target.base.config.rope, scaling, original_context=original, head_dim=target.base.config.head_dim)
    except ValueError as e:
        raise UnsupportedError(f"--rope on {target.base.name}: {e}") from e
    return replace(
        target,
        label=f"{target.label} ({scaling.type} × {scaling.factor:g})",
        context_length=int(original * scaling.factor),
        original_context_length=original,
        rope=rope,
    )
