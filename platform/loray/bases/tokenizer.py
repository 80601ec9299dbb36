"""The tokenizer of a base in one file, which the tokenizers library reads alone.

transformers makes a tokenizer of several files and of rules for each model family, and needs torch for it. What it
makes is written into the base's folder when the base is added, so that a process that encodes and decodes needs
neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from loray.errors import IntegrityError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "loray-tokenizer.json"


def write(folder: Path) -> None:
    """Write the file. Raises UnsupportedError where the checkpoint's tokenizer cannot be loaded."""
    from transformers import AutoTokenizer  # takes seconds

    try:
        tokenizer = cast("Tokenizer", AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer)
    except Exception as e:  # transformers raises any error, of whatever it meets in the files
        raise UnsupportedError(f"the tokenizer in {folder} cannot be loaded: {e}") from e
    tokenizer.save(str(folder / FILE), pretty=False)


def load(folder: Path) -> Tokenizer:
    """Load the tokenizer of a base. Raises IntegrityError where the file is missing."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(read(folder))


def read(folder: Path) -> str:
    """Read the tokenizer as JSON, in the tokenizers library's format. Raises IntegrityError where it is missing."""
    try:
        return (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise IntegrityError(f"{folder} lacks {FILE}: add the base again with `loray base add`") from e
