"""Resources of the catalog's REST API: uploads, downloads, and the request that makes a version."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loray.api.resources import NoGate, Resource, VersionNumber
from loray.spec import Alias, Name, Sha256, ToolParserName

DownloadForm = Literal["peft", "merged", "gguf"]

_OF_UPLOADS = {"base", "licence", "description", "tool_parser"}


class Registration(BaseModel):
    """An adapter that the store has already, by its `digest`, or the files of an `upload`, of which it is made.

    `version` asks for a number instead of the next one. The rest describes an upload; `base` is a base model of the
    server, which finds it from the folder where it can.
    """

    model_config = ConfigDict(extra="forbid")

    digest: Sha256 | None = None
    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    aliases: tuple[Alias, ...] = ()
    version: VersionNumber | None = None
    no_gate: NoGate = None
    base: Name | None = None
    licence: Annotated[str, Field(max_length=200)] | None = None
    description: Annotated[str, Field(max_length=2000)] = ""
    tool_parser: ToolParserName | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.digest is None) == (self.upload is None):
            raise ValueError("give either digest or upload")
        if self.upload is None and (self.base, self.licence, self.description, self.tool_parser) != (
            None,
            None,
            "",
            None,
        ):
            raise ValueError("base, licence, description and tool_parser belong to an upload")
        return self


class FileResource(Resource):
    name: str
    sha256: str
    nbytes: int


class PresignedFileResource(FileResource):
    url: str = Field(description="whoever has it reads the file until `expires_at`; send no key with it")


class DownloadResource(Resource):
    """Where a version's files are read, the smallest first. They are checked by their SHA-256."""

    files: tuple[PresignedFileResource, ...]
    expires_at: datetime


class UploadResource(Resource):
    """A folder that comes file by file. `files` are those that are there as a whole."""

    id: str
    files: tuple[FileResource, ...]
    published: bool = Field(default=False, description="a version was made of it; it takes no files any more")
