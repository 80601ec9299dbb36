"""A copy of an adapter's files in memory, as one cache gives it to another: content that its digest proves."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loray.adapters.manifest import parse_manifest, read_canonical, write_manifest
from loray.errors import IntegrityError


class AdapterCopy(NamedTuple):
    """`manifest`: canonical JSON, whose SHA-256 is the adapter's digest. `files`: the bytes of the files that it names.

    They are arrays, since Ray maps arrays from its object store into memory without copying them.
    """

    manifest: bytes
    files: Mapping[str, npt.NDArray[np.uint8]]


def read_copy(folder: Path, max_bytes: int) -> AdapterCopy | None:
    """The adapter in a cache's `folder`; None where its files have more than `max_bytes`. Nothing is verified.

    Raises IntegrityError where there is no manifest, OSError where a file cannot be read.
    """
    canonical = read_canonical(folder)
    names = sorted(parse_manifest(canonical, source=str(folder)).files)
    if sum((folder / name).stat().st_size for name in names) > max_bytes:
        return None
    return AdapterCopy(canonical, {name: np.fromfile(folder / name, dtype=np.uint8) for name in names})


def write_copy(copy: AdapterCopy, digest: str, folder: Path) -> None:
    """Write `copy` to `folder`, which must be new, and appears when it is complete and every byte has been verified.

    Raises IntegrityError where the copy is not of the adapter `digest`, OSError where it cannot be written.
    """
    if hashlib.sha256(copy.manifest).hexdigest() != digest:
        raise IntegrityError(f"the copy's manifest is not that of adapter {digest[:12]}")
    manifest = parse_manifest(copy.manifest, source=f"a copy of adapter {digest[:12]}")
    temporary = Path(tempfile.mkdtemp(prefix=".copy-", dir=folder.parent))
    try:
        for name, sha256 in sorted(manifest.files.items()):
            data = copy.files.get(name)
            if data is None or hashlib.sha256(data.data).hexdigest() != sha256:
                raise IntegrityError(f"the copy of adapter {digest[:12]} is damaged: {name} differs from its SHA-256")
            data.tofile(temporary / name)
        write_manifest(temporary, copy.manifest)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
