"""Sources of a base model: a folder or the Hugging Face hub. The configuration is checked before files are copied."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import replace
from pathlib import Path

from loray.bases import checkpoint
from loray.bases.config import ModelConfig
from loray.errors import BaseNotFound, UnsupportedError
from loray.telemetry import Progress

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
    "LICENSE*",
    "README.md",
)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint. Raises UnsupportedError where the decoder does not cover it or where it is
    quantised.

    End tokens outside the vocabulary are left out, for example -1, which some checkpoints have for "none": no token is
    ever one of them, as with transformers, and a device that forbids them would write outside of its logits.
    """
    try:
        config = ModelConfig.from_folder(folder)
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
        more = eos if isinstance(eos, list) else [] if eos is None else [eos]
        ends = tuple(t for t in dict.fromkeys((*config.eos_token_ids, *more)) if 0 <= t < config.vocab_size)
    except KeyError as e:
        raise UnsupportedError(f"{folder}/config.json lacks {e.args[0]!r}") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise UnsupportedError(f"the configuration in {folder} cannot be read: {e}") from e
    if raw.get("quantization_config"):
        raise UnsupportedError(f"{folder} is a quantised checkpoint; add the bf16, fp16 or fp32 one")
    return replace(config, eos_token_ids=ends)


def checked_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint, checked against its tensors and tokenizer. Reads no tensor.

    Raises as `read_config` and `checkpoint.check_tensors` do.
    """
    config = read_config(folder)
    checkpoint.check_tensors(folder, config)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); save it beside the weights")
    return config


def fill_from_folder(source: Path, target: Path, scratch: Path, progress: Progress) -> None:
    """Copy weights, configuration and tokenizer to `target`, and nothing else. Links are followed."""
    files = [p for p in sorted(source.iterdir()) if p.is_file() and is_copied(p.name)]
    weights = checkpoint.weight_files(source)
    index = source / checkpoint.INDEX_FILE
    files += [*weights, index] if index.is_file() else weights
    total = sum(p.stat().st_size for p in files) or 1
    done = 0
    for file in files:
        with file.open("rb") as src, (target / file.name).open("wb") as dst:
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


def is_copied(name: str) -> bool:
    """Whether a base includes this file of a checkpoint's folder. Weights are not meant."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _COPIED)
