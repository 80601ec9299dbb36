"""Bodies of OpenAI's files: `/v1/files`."""

from __future__ import annotations

from typing import Literal

from loray.schemas.openai.responses import ResponseBody

SHORTEST_EXPIRY_S, LONGEST_EXPIRY_S = 3600, 30 * 24 * 3600  # `expires_after.seconds`


class Answer(ResponseBody):
    """It is sent with all its fields."""

    def to_json(self) -> str:
        return self.model_dump_json()


class FileObject(Answer):
    """`created_at` and `expires_at` are seconds since the epoch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Answer):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class FileDeleted(Answer):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
