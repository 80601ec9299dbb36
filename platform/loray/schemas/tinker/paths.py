"""Identifiers of Tinker's protocol: sessions, models, requests, sequences, and paths of checkpoints.

A model is `SESSION:train:N`, which the SDK computes itself; a sampling session is `SESSION:sample:N`; a request is the
model or the sampling session, `#` and its sequence number, so the same request sent twice has the same id.
"""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

from loray.errors import RequestError, shown
from loray.spec.tinker import CheckpointKind

START = "tinker://"
_FOLDERS: dict[CheckpointKind, str] = {"training": "weights", "sampler": "sampler_weights"}
_KINDS = {folder: kind for kind, folder in _FOLDERS.items()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REQUEST = re.compile(r"(?P<of>[a-z0-9-]{1,64}:(?P<kind>train|sample):[0-9]{1,9})#(?P<seq>[0-9]{1,19})")


def new_session_id() -> str:
    return f"session-{secrets.token_hex(8)}"


def model_id_of(session_id: str, seq: int) -> str:
    return f"{session_id}:train:{seq}"


def sampler_id_of(session_id: str, seq: int) -> str:
    return f"{session_id}:sample:{seq}"


class RequestId(NamedTuple):
    """`of`: the id of the model or of the sampling session."""

    of: str
    is_training: bool
    seq: int

    def __str__(self) -> str:
        return f"{self.of}#{self.seq}"

    @classmethod
    def parse(cls, text: str) -> RequestId:
        """Raises RequestError."""
        match = _REQUEST.fullmatch(text)
        if match is None:
            raise RequestError(f"{shown(text)} is no request_id of this server", "request_id")
        return cls(match["of"], match["kind"] == "train", int(match["seq"]))


class CheckpointPath(NamedTuple):
    """`tinker://MODEL/weights/NAME`, or `…/sampler_weights/NAME`."""

    model_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"{START}{self.model_id}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        return f"{_FOLDERS[self.kind]}/{self.name}"

    @classmethod
    def parse(cls, path: str) -> CheckpointPath:
        """Raises RequestError."""
        parts = path.removeprefix(START).split("/")
        if not path.startswith(START) or len(parts) != 3 or parts[1] not in _KINDS or not _NAME.fullmatch(parts[2]):
            raise RequestError(
                f"{shown(path)} is no path of a checkpoint: tinker://MODEL/weights/NAME or "
                "tinker://MODEL/sampler_weights/NAME",
                "path",
            )
        return cls(parts[0], _KINDS[parts[1]], parts[2])

    @classmethod
    def of(cls, model_id: str, folder: str, name: str) -> CheckpointPath:
        """The path of `GET training_runs/MODEL/checkpoints/FOLDER/NAME`. Raises RequestError."""
        return cls.parse(f"{START}{model_id}/{folder}/{name}")


def check_checkpoint_name(name: str) -> str:
    """Return the name. Raises RequestError."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{shown(name)} is no name of a checkpoint: letters, digits, '.', '_' and '-', at most 96", "path"
        )
    return name
