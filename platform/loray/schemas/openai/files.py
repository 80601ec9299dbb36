"""Bodies of OpenAI's files and batches: `/v1/files`, `/v1/batches`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from loray.schemas.openai.fields import Body
from loray.schemas.openai.responses import ResponseBody

SHORTEST_EXPIRY_S, LONGEST_EXPIRY_S = 3600, 30 * 24 * 3600  # `expires_after.seconds`


class Answer(ResponseBody):
    """An answer is sent with all its fields, also with those that are null."""

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


# -- batches ----------------------------------------------------------------------------------------------------------

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
_MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_EXPIRY_S, le=LONGEST_EXPIRY_S)


class BatchRequest(Body):
    input_file_id: str = Field(max_length=64)
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: dict[_MetadataKey, _MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


class BatchLineError(Answer):
    """`line` is one of the input, from 1 on."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Answer):
    object: Literal["list"] = "list"
    data: list[BatchLineError]


class RequestCounts(Answer):
    total: int
    completed: int
    failed: int


class BatchObject(Answer):
    """Times are seconds since the epoch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(Answer):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
