"""The tokenizer of a base in one file, which the tokenizers library reads alone.

transformers makes a tokenizer of several files and of rules for each model family, and needs torch for it. What it
makes is written into the base's folder when the base is added, so that a process that encodes and decodes needs
neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from loray.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "loray-tokenizer.json"


def write(folder: Path) -> None:
    """Write the file. Raises UnsupportedError where the checkpoint's tokenizer cannot be loaded."""
    _from_transformers(folder).save(str(folder / FILE), pretty=False)


def load(folder: Path) -> Tokenizer:
    """Load the tokenizer of a base. One without the file was added by an older version; then transformers makes it."""
    from tokenizers import Tokenizer

    file = folder / FILE
    return Tokenizer.from_file(str(file)) if file.is_file() else _from_transformers(folder)


def read(folder: Path) -> str:
    """Read the tokenizer as JSON, in the tokenizers library's format."""
    file = folder / FILE
    return file.read_text(encoding="utf-8") if file.is_file() else _from_transformers(folder).to_str()


def _from_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds

    try:
        return cast("Tokenizer", AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer)
    except Exception as e:  # transformers raises any error, of whatever it meets in the files
        raise UnsupportedError(f"the tokenizer in {folder} cannot be loaded: {e}") from e
