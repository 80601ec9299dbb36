"""Conversions: of published adapters to LoRA, into the base, to GGUF; of PEFT's other kinds to LoRA.

Servers, which do not load torch, run this module as a process. It takes so many bytes at most beside the base's files,
which it maps to merge them, and ends when its standard input does, that is with the server. What went wrong is one line
of JSON on standard output: the error's class and its message.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loray import errors
from loray.adapters.manifest import ManifestDetails, read_manifest, with_manifest
from loray.adapters.peft_format import load_config, read_adapter, read_config
from loray.bases.checkpoint import weight_files
from loray.bases.registry import BaseModel, base_with
from loray.catalog import AdapterVersion
from loray.errors import ConflictError, LorayError, SpecError, StoreError, UnsupportedError
from loray.files import scratch_folder
from loray.methods import METHODS_OF_PEFT
from loray.publishing.publish import Destination, import_folder, publish
from loray.settings import Settings
from loray.spec import AdapterManifest, AdapterRef, ToolParserName, format_size
from loray.store import AdapterStore, open_store

if TYPE_CHECKING:
    from loray.adapters.approximate import Approximation
    from loray.methods.weights import AdapterWeights


def convert_to_lora(ref: AdapterRef, base: BaseModel, to: Destination) -> AdapterVersion:
    """Publish the VeRA or MiSS adapter `ref` as a LoRA adapter of its rank, in fp32.

    It computes the same, so RoPE, context and evaluations are those of `ref`. Raises UnsupportedError where `ref` is
    of another method.
    """
    from loray.adapters.convert import save_lora, to_lora

    with _opened(ref, base, to.store) as (manifest, weights), scratch_folder() as made:
        save_lora(to_lora(weights, base.config), made, base_name=base.name)
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


MAX_ENERGY_LOST = 0.01  # of a change, where a rank is asked for and no other limit


def import_as_lora(
    folder: Path,
    base: BaseModel,
    to: Destination,
    *,
    rank: int | None,
    energy: float | None,
    max_energy_lost: float | None,
    licence: str | None = None,
    description: str = "",
    tool_parser: ToolParserName | None = None,
) -> tuple[AdapterVersion, Approximation]:
    """Publish LoRA that approximates the PEFT adapter in `folder`, which is of a kind that is not served itself.

    `rank` and `energy` are those of `approximate`. Raises ConflictError where more than `max_energy_lost` of the
    change's energy would be lost (None: MAX_ENERGY_LOST, or what `energy` allows), and UnsupportedError for a kind that
    is served as it is or of which no LoRA can be made.
    """
    from loray.adapters.approximate import approximate

    config = load_config(folder)
    method = METHODS_OF_PEFT.get(str(config.get("peft_type")))
    try:
        read_config(folder)
    except UnsupportedError:
        if method is not None and not method.has_variants:
            raise
    else:
        raise UnsupportedError(f"{folder}: {config['peft_type']} is served as it is: import it without a rank")
    limit = max_energy_lost if max_energy_lost is not None else MAX_ENERGY_LOST if energy is None else 1 - energy
    with scratch_folder() as scratch:
        made = scratch / "lora"
        found = approximate(folder, base, made, rank=rank, energy=energy)
        if found.energy_lost > limit:
            raise ConflictError(
                f"{found}; more than {limit:.2%} are not: take a higher rank, or allow it with --max-energy-lost"
            )
        if (template := folder / AdapterManifest.TEMPLATE_FILE).is_file():
            shutil.copy2(template, made / template.name)
        said = description or str(found)
        version = import_folder(made, base, to, licence=licence, description=said, tool_parser=tool_parser)
        return version, found


def merge_into_base(
    ref: AdapterRef,
    folder: Path,
    *,
    base: BaseModel,
    store: AdapterStore,
    dtype: str | None = None,
    as_trained: bool = False,
) -> None:
    """Write `base` with `ref` merged into it to the new `folder`, in `dtype` or its own: see `adapters.convert`.

    `as_trained`: into the base as it was quantized while `ref` was trained. Raises SpecError where it was not.
    """
    import torch

    from loray.adapters.convert import RoundedBase, merge_adapter

    with _opened(ref, base, store) as (manifest, weights):
        recipe, trained_on = manifest.recipe, None
        if as_trained and base.config.quantization is None:  # else the base is the one that it was trained on
            if recipe is None or recipe.quantization is None:
                raise SpecError(f"{ref.label} was not trained on a quantized base: leave out --as-trained")
            trained_on = RoundedBase(recipe.quantization, getattr(torch, recipe.chosen_dtype))
        kept = None if dtype is None else getattr(torch, dtype)
        merge_adapter(base, weights, folder, dtype=kept, trained_on=trained_on)


def save_as_gguf(ref: AdapterRef, path: Path, *, base: BaseModel, store: AdapterStore) -> None:
    """Write `ref` as GGUF-LoRA to the new file `path`: see `adapters.convert`."""
    from loray.adapters.convert import write_gguf

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


# -- in a process -----------------------------------------------------------------------------------------------------

Form = Literal["merged", "gguf"]
MAX_MEMORY_BYTES = 8 << 30

_MODULE = "loray.publishing.convert"
_FAILED = 1


def command_of(form: Form, ref: AdapterRef, target: Path, max_bytes: int = MAX_MEMORY_BYTES) -> list[str]:
    """The command of a process that writes `target`, the new folder of the checkpoint or the new GGUF file, with
    `max_bytes` of memory at most.
    """
    return [sys.executable, "-m", _MODULE, form, ref.digest, ref.label, str(target), str(max_bytes)]


def environment_of(settings: Settings) -> dict[str, str]:
    """The process's environment, without the catalog, which a conversion does not need, and without keys."""
    ours = {"LORAY_HOME": str(settings.home), "LORAY_STORE": settings.store, "LORAY_LOG_LEVEL": settings.log_level}
    return {name: value for name, value in os.environ.items() if not name.startswith("LORAY_")} | ours


def raise_failure(code: int, output: bytes) -> None:
    """Raise the error of a process that ended with `code`, if it failed."""
    if code == 0:
        return
    try:
        said: Mapping[str, str] = json.loads(output.splitlines()[-1])
        kind, message = getattr(errors, said["kind"], None), said["message"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise LorayError(f"the conversion ended without an answer (exit code {code})") from None
    raise (kind if isinstance(kind, type) and issubclass(kind, LorayError) else LorayError)(message)


def main(arguments: Sequence[str]) -> int:
    form, digest, label, path, max_bytes = arguments
    target = Path(path)
    if target.exists():
        raise SystemExit(f"{target} exists already")
    threading.Thread(target=_end_with_the_server, args=(target,), daemon=True).start()
    try:
        _convert(form, digest, label, target, int(max_bytes))
    except LorayError as e:
        kind, message = type(e).__name__, str(e)
    except (MemoryError, RuntimeError, OSError) as e:
        kind, message = _failure(e, int(max_bytes))
    else:
        return 0
    sys.stdout.write(json.dumps({"kind": kind, "message": message}) + "\n")
    return _FAILED


def _failure(error: Exception, max_bytes: int) -> tuple[str, str]:
    """The class and the message of the error that the server raises."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, MemoryError) or "allocate memory" in reason:  # as torch says it, and the system
        return UnsupportedError.__name__, (
            f"the conversion needs more than the {format_size(max_bytes)} of memory that this server has for it now: "
            "ask again later, or use `loray adapters convert` where there is more"
        )
    if isinstance(error, OSError):  # such as a full disk
        return StoreError.__name__, f"the conversion failed: {error.strerror or error}"
    return LorayError.__name__, f"the conversion failed: {reason}"


def _convert(form: str, digest: str, label: str, target: Path, max_bytes: int) -> None:
    settings = Settings.from_env()
    store = AdapterStore(open_store(settings.store))
    manifest = store.manifest(digest)
    name, _, version = label.rpartition("@")
    ref = manifest.ref(digest, name, int(version))
    base = base_with(settings.home, manifest.base_fingerprint, manifest.base)
    mapped = weight_files(base.path) if form == "merged" else ()
    limit = max_bytes + sum(path.stat().st_size for path in mapped)  # the system can drop what is mapped
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if form == "merged":
        merge_into_base(ref, target, base=base, store=store)
    else:
        save_as_gguf(ref, target, base=base, store=store)


def _end_with_the_server(target: Path) -> None:
    while os.read(0, 1024):  # not sys.stdin, whose lock Python would wait for at its end
        pass
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    os._exit(_FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
