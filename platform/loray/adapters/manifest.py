"""The manifest of an adapter, `loray.json`: written, read, and named by its digest; and folders checked as a whole.

The digest is the SHA-256 of the manifest's canonical JSON. The manifest holds the SHA-256 of every file, so that the
digest pins all bytes, and VeRA's pair. Works without torch.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pydantic import ValidationError

from loray.adapters.files import check_declared, check_finite, header_of, own_bytes, read_header
from loray.adapters.peft_format import (
    CONFIG_FILE,
    MODULES,
    WEIGHTS_FILE,
    parse_adapter,
    parse_config,
    read_config,
    weights_path,
    without_prefix,
)
from loray.bases.checkpoint import TensorEntry
from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel
from loray.errors import IntegrityError, SpecError, UnsupportedError
from loray.files import canonical_json, file_sha256
from loray.methods import METHODS
from loray.methods.pairs import PAIR_NAMES, PairKey, drawn_digest, stored_digest
from loray.methods.weights import AdapterWeights, SharedProjection
from loray.spec import (
    MAX_DESCRIPTION_CHARACTERS,
    MAX_EVALUATIONS,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_TEMPLATE_CHARACTERS,
    AdapterManifest,
    Evaluation,
    Method,
    Projection,
    RopeParameters,
    ToolParserName,
    TrainSpec,
)

if TYPE_CHECKING:
    from torch import Tensor

# The files of a published adapter. Others in its folder (optimizer states, pickles) are not published.
PUBLISHED_FILES = (CONFIG_FILE, WEIGHTS_FILE, AdapterManifest.TEMPLATE_FILE, "README.md", "LICENSE*")

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ManifestDetails:
    """Fields of a manifest that the adapter's files do not contain.

    derived_from             digest of the adapter that this one was converted from
    parent                   digest of the adapter whose training this one goes on from
    sweep                    the sweep whose best trial it was, and the trial
    rope_parameters          None: the base's RoPE
    context_length           None: the base's context
    original_context_length  None: the context that the recipe extends, else the base's
    created_at               when the weights were written; None: the time of their file, so that `describe` gives the
                             same digest again
    """

    recipe: TrainSpec | None = None
    dtype_reason: str | None = None
    job_id: str | None = None
    data_fingerprint: str | None = None
    derived_from: str | None = None
    parent: str | None = None
    sweep: str | None = None
    evaluations: Sequence[Evaluation] = ()
    licence: str | None = None
    description: str = ""
    rope_parameters: RopeParameters | None = None
    context_length: int | None = None
    original_context_length: int | None = None
    tool_parser: ToolParserName | None = None
    created_at: datetime | None = None


NO_DETAILS = ManifestDetails()


def describe(folder: Path, base: BaseModel, details: ManifestDetails = NO_DETAILS) -> AdapterManifest:
    """Check the PEFT adapter in `folder` against `base`, and write its `loray.json`.

    Raises UnsupportedError, BaseMismatch or IntegrityError where the adapter cannot be served on `base`, and SpecError
    where the recipe is of another method.
    """
    checked = validate_folder(folder, base.config)
    if details.created_at is None:
        created_at = datetime.fromtimestamp((folder / WEIGHTS_FILE).stat().st_mtime, UTC)
        details = replace(details, created_at=created_at)
    files = {path.name: file_sha256(path) for path in published_files(folder)}
    manifest = _described(checked, base, details, files, _own_template(folder, base), str(folder))
    write_manifest(folder, manifest_json(manifest))
    return manifest


def describe_files(files: Mapping[str, bytes], base: BaseModel, details: ManifestDetails) -> AdapterManifest:
    """Describe the PEFT adapter of these files in memory as `describe` does one in a folder; `details` say when it was
    made. Raises the same, but does not look at values: a trainer skips steps that are not finite.
    """
    source = "the adapter"
    checked = _checked(
        parse_config(Path(source), files[CONFIG_FILE]),
        header_of(files[WEIGHTS_FILE], source=source),
        base.config,
        lambda: io.BytesIO(files[WEIGHTS_FILE]),
        source,
    )
    return _described(checked, base, details, hashes_of(files), None, source)


def hashes_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Hash files in memory for their manifest."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def _described(
    checked: CheckedFolder,
    base: BaseModel,
    details: ManifestDetails,
    files: dict[str, str],
    template: str | None,
    source: str,
) -> AdapterManifest:
    weights, original_context = checked.weights, None
    assert details.created_at is not None
    if details.rope_parameters is not None:
        original_context = details.original_context_length or _original_context(base, details.recipe)
    try:
        manifest = AdapterManifest(
            method=_method(source, weights, details.recipe, details.rope_parameters),
            invocation_tokens=weights.invocation_tokens,
            base=base.name,
            base_fingerprint=base.fingerprint,
            rank=max((module.rank for module in weights.modules.values()), default=0),
            target_modules=tuple(m for m in MODULES if any(key.module == m for key in weights.modules)),
            num_parameters=checked.num_parameters,
            nbytes=checked.nbytes,
            context_length=details.context_length or base.config.max_position_embeddings,
            original_context_length=original_context,
            rope_parameters=details.rope_parameters,
            projection=_projection(weights, checked.prng_key),
            files=files,
            derived_from=details.derived_from,
            parent=details.parent,
            sweep=details.sweep,
            recipe=details.recipe,
            dtype_reason=details.dtype_reason,
            job_id=details.job_id,
            data_fingerprint=details.data_fingerprint,
            evaluations=tuple(details.evaluations),
            licence=details.licence,
            description=details.description,
            tool_parser=details.tool_parser,
            chat_template=template,
            created_at=details.created_at.isoformat(timespec="seconds"),
        )
    except ValidationError as e:
        raise SpecError(f"the manifest of {source} would not be valid: {e}") from e
    check_size(manifest, manifest_json(manifest))
    return manifest


def with_manifest(weights: AdapterWeights, manifest: AdapterManifest, label: str) -> AdapterWeights:
    """Add the manifest's RoPE and context, which PEFT's files do not contain.

    Raises IntegrityError where VeRA's pair, or aLoRA's invocation, is not that of the manifest.
    """
    trained_with = manifest.projection and manifest.projection.sha256
    if weights.pair is not None and weights.pair.digest != trained_with:
        raise IntegrityError(
            f"adapter {label}: its VeRA projection is not the pair it was trained with, whose SHA-256 is in its "
            "manifest; publish it with save_projection, or serve it with the PyTorch it was trained with"
        )
    _check_invocation(manifest, weights, source=f"adapter {label}")
    return replace(weights, rope=manifest.rope_parameters, context_length=manifest.context_length)


def _check_invocation(manifest: AdapterManifest, weights: AdapterWeights, *, source: str) -> None:
    """Raise IntegrityError where requests, which know the manifest, would activate an adapter elsewhere than PEFT."""
    if manifest.invocation_tokens != weights.invocation_tokens:
        raise IntegrityError(
            f"{source}: {CONFIG_FILE} has other alora_invocation_tokens than the manifest; publish the adapter again"
        )


def manifest_json(manifest: AdapterManifest) -> bytes:
    """Write the manifest as canonical JSON without nulls. The digest is its SHA-256, and the store keeps it."""
    return canonical_json(manifest.model_dump(mode="json", exclude_none=True)).encode()


def digest(manifest: AdapterManifest) -> str:
    """Compute the adapter's identity: the SHA-256 of `manifest_json`, 64 hex digits."""
    return hashlib.sha256(manifest_json(manifest)).hexdigest()


def check_size(manifest: AdapterManifest, canonical: bytes) -> None:
    """Raise SpecError for a manifest that is too large to be published: catalogs keep it, and lists read it."""
    too_many = [
        f"{count:,} {what}, and may have {most:,}"
        for count, most, what in (
            (len(canonical) + 1, MAX_MANIFEST_BYTES, "bytes with its recipe, evaluations and template"),
            (len(manifest.description), MAX_DESCRIPTION_CHARACTERS, "characters of description"),
            (len(manifest.evaluations), MAX_EVALUATIONS, "evaluations"),
        )
        if count > most
    ]
    if too_many:
        raise SpecError(f"the adapter's manifest has {'; '.join(too_many)}")


def check_recipe(spec: TrainSpec) -> None:
    """Raise SpecError for a recipe whose adapter could not be published: before it is trained."""
    num_bytes = len(canonical_json(spec.model_dump(mode="json", exclude_none=True)).encode())
    if num_bytes > MAX_RECIPE_BYTES:
        raise SpecError(
            f"the recipe has {num_bytes:,} bytes, and a manifest has room for {MAX_RECIPE_BYTES:,}: name folders of "
            "data instead of files"
        )
    if (length := len(spec.publish.description)) > MAX_DESCRIPTION_CHARACTERS:
        raise SpecError(f"publish.description has {length:,} characters, and may have {MAX_DESCRIPTION_CHARACTERS:,}")


def manifest_file(canonical: bytes) -> bytes:
    """Make the bytes of `loray.json`: `canonical`, indented for people where it stays small enough to be uploaded."""
    text = json.dumps(json.loads(canonical), indent=2, ensure_ascii=False).encode()
    return (text if len(text) < MAX_MANIFEST_BYTES else canonical) + b"\n"


def write_manifest(folder: Path, canonical: bytes) -> None:
    """Write `canonical` as `loray.json`. `read_canonical` reads the same bytes again."""
    (folder / AdapterManifest.FILE).write_bytes(manifest_file(canonical))


def read_manifest(folder: Path) -> AdapterManifest:
    """Read the manifest of `folder`.

    Raises IntegrityError where there is no valid `loray.json`, and UnsupportedError where a later loray wrote it.
    """
    return parse_manifest(read_canonical(folder), source=str(folder / AdapterManifest.FILE))


def read_canonical(folder: Path) -> bytes:
    """Read the manifest of `folder` as canonical JSON. Raises IntegrityError where there is none or it is not JSON."""
    path = folder / AdapterManifest.FILE
    if not path.is_file():
        raise IntegrityError(f"{folder} has no {AdapterManifest.FILE}: it is not a published adapter")
    try:
        return canonical_json(json.loads(path.read_text(encoding="utf-8"))).encode()
    except ValueError as e:
        raise IntegrityError(f"{path} is not valid JSON: {e}") from e


def parse_manifest(data: bytes, *, source: str) -> AdapterManifest:
    """Parse a manifest. Raises as `read_manifest` does; errors name `source`."""
    try:
        raw = json.loads(data)
    except ValueError as e:
        raise IntegrityError(f"{source} is not valid JSON: {e}") from e
    number = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(number, int) and number > _FORMAT:
        raise UnsupportedError(f"{source} has manifest format {number}; this loray reads {_FORMAT}: upgrade it")
    try:
        manifest = AdapterManifest.parse(raw, source=source)
    except SpecError as e:
        raise IntegrityError(str(e)) from e
    bad = [name for name in manifest.files if Path(name).name != name or name in (".", "..", AdapterManifest.FILE)]
    if bad:
        raise IntegrityError(f"{source} names the file {bad[0]!r}, which is not a plain file name")
    return manifest


def verify_folder(folder: Path) -> AdapterManifest:
    """Hash every file of the manifest. Raises IntegrityError, which names the first that is missing or differs."""
    manifest = read_manifest(folder)
    for name, expected in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{folder} is incomplete: {name} is missing")
        if file_sha256(path) != expected:
            raise IntegrityError(f"{path} is damaged: its SHA-256 is not the one in {AdapterManifest.FILE}")
    return manifest


def verify_files(files: Mapping[str, bytes], digest: str) -> None:
    """Hash files that came by name. Raises IntegrityError unless they are those of the adapter with this digest."""
    source = f"what was given for adapter {digest[:12]}"
    try:
        canonical = canonical_json(json.loads(files[AdapterManifest.FILE])).encode()
        manifest = parse_manifest(canonical, source=source)
        wrong = [name for name, sha in manifest.files.items() if hashlib.sha256(files[name]).hexdigest() != sha]
    except (KeyError, ValueError) as e:
        raise IntegrityError(f"{source} is incomplete: {e}") from e
    if wrong or hashlib.sha256(canonical).hexdigest() != digest:
        raise IntegrityError(f"{source} is another adapter, or {wrong or AdapterManifest.FILE} is damaged")


def published_files(folder: Path) -> list[Path]:
    """List the files of a PEFT folder that belong to the adapter, sorted by name."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in PUBLISHED_FILES)
    ]


def _own_template(folder: Path, base: BaseModel) -> str | None:
    """The adapter's chat template where it has one that is not the base's."""
    path, of_base = folder / AdapterManifest.TEMPLATE_FILE, base.path / AdapterManifest.TEMPLATE_FILE
    if not path.is_file():
        return None
    try:
        template = path.read_bytes().decode()  # as it is: its SHA-256 is that of the file
    except UnicodeDecodeError as e:
        raise SpecError(f"{path} is not UTF-8") from e
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise SpecError(f"{path} has {len(template):,} characters; a template may have {MAX_TEMPLATE_CHARACTERS:,}")
    return None if of_base.is_file() and template == of_base.read_bytes().decode() else template


def _method(
    folder: str, weights: AdapterWeights, recipe: TrainSpec | None, rope_parameters: RopeParameters | None
) -> Method:
    method, is_invoked = weights.method, weights.invocation_tokens is not None
    if is_invoked and rope_parameters is not None:
        raise SpecError(f"{folder} has alora_invocation_tokens: what is before them is the base's, and so is its RoPE")
    if recipe is None:
        return "alora" if is_invoked else "longlora" if method == "lora" and rope_parameters is not None else method
    declared = recipe.adapter.method
    if METHODS[declared].stored_as != method or recipe.adapter.invoked_by != weights.invocation_tokens:
        held = "an alora" if is_invoked else f"a {method}"
        raise SpecError(f"{folder} holds {held} adapter, but its recipe says {declared}")
    return declared


def _original_context(base: BaseModel, recipe: TrainSpec | None) -> int:
    window = base.config.max_position_embeddings
    scaling = None if recipe is None else recipe.rope_scaling
    return window if scaling is None else scaling.extended_from(window)


def _projection(weights: AdapterWeights, key: int) -> Projection | None:
    if weights.pair is None:
        return None
    a_RI, b_OR = weights.pair.a_RI, weights.pair.b_OR
    return Projection(
        key=key, rank=a_RI.shape[0], max_in=a_RI.shape[1], max_out=b_OR.shape[0], sha256=weights.pair.digest
    )


# -- a folder as a whole ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """`weights` has the shapes of the tensors and no values. `entries` is the file's header."""

    weights: AdapterWeights
    entries: Mapping[str, TensorEntry]
    prng_key: int

    @property
    def num_parameters(self) -> int:
        """The elements of all tensors but VeRA's shared pair, which `nbytes` leaves out, too."""
        return sum(math.prod(entry.shape) for name, entry in self.entries.items() if name not in PAIR_NAMES)

    @property
    def nbytes(self) -> int:
        return own_bytes(self.entries)


def validate_folder(folder: Path, base: ModelConfig, manifest: AdapterManifest | None = None) -> CheckedFolder:
    """Check the adapter in `folder`, which may be anybody's, for a base of this configuration.

    Shapes are those of the header; values and VeRA's pair pass in blocks: it costs one pass over the file, and memory
    for a part of it. `manifest` is that of a published adapter; it must not say less than the file has. Raises
    UnsupportedError, BaseMismatch or IntegrityError.
    """
    config = read_config(folder)
    path = weights_path(folder)
    entries = read_header(path)
    if manifest is not None:
        check_declared(entries, manifest, source=str(path))
    checked = _checked(config, entries, base, lambda: path.open("rb"), str(folder))
    if manifest is not None:
        _check_invocation(manifest, checked.weights, source=str(folder))
    check_finite(path, entries)
    return checked


def _checked(
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    base: ModelConfig,
    open_weights: Callable[[], BinaryIO],
    source: str,
) -> CheckedFolder:
    shapes = cast("dict[str, Tensor]", without_prefix(entries))
    weights = parse_adapter(Path(source), config, shapes, base, partial(_pair_in_blocks, open_weights))
    return CheckedFolder(weights, entries, int(config.get("projection_prng_key", 0)))


def _pair_in_blocks(
    open_weights: Callable[[], BinaryIO], drawn: PairKey, stored: Mapping[str, Tensor]
) -> SharedProjection:
    """VeRA's pair by its shapes and its digest."""
    if stored:
        a, b = (cast(TensorEntry, stored[name]) for name in ("A", "B"))
        with open_weights() as f:
            digest = stored_digest(f, a, b)
    else:
        a, b = (TensorEntry("F32", shape, 0, 0) for shape in drawn.shapes)
        digest = drawn_digest(drawn)
    return SharedProjection(cast("Tensor", a), cast("Tensor", b), digest)
