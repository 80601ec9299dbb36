"""The body of `POST /v1/files`: a form, whose file goes to the store while it comes.

At most a part that is being stored and the next one are in memory, and what comes with one message. The fields of a
form may come in any order: a file that comes before its purpose is checked against it afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from loray.catalog.files import DEFAULT_EXPIRY_S, MAX_BYTES, Purpose, UserFile, check_purpose
from loray.errors import KeyRevoked, RequestError, shown
from loray.publishing.user_files import FileWriter
from loray.schemas.openai.files import LONGEST_EXPIRY_S, SHORTEST_EXPIRY_S
from loray.spec import Principal
from serve_apps.gateway.files.storage import FileStorage

MAX_FORM_BYTES = max(MAX_BYTES.values()) + (64 << 10)
_FIELD_BYTES, _MOST_FIELDS, _MAX_NAME = 1024, 8, 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = frozenset({"purpose", _ANCHOR, _SECONDS})


class FileFields(NamedTuple):
    """The checked fields of a form."""

    filename: str
    purpose: Purpose
    expires_after_s: int


class FileForm:
    """Takes a form piece by piece: its fields into memory, its file into `writer`."""

    def __init__(self, content_type: str, writer: FileWriter, principal: Principal) -> None:
        """Raises RequestError where it is no form."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise RequestError("send a form, Content-Type: multipart/form-data, with the fields purpose and file")
        self._writer, self._principal = writer, principal
        self._fields: dict[str, bytearray] = {}
        self._whole: set[str] = set()  # parts that have come as a whole
        self._filename: str | None = None
        self._header, self._value, self._name = bytearray(), bytearray(), ""
        self._disposition, self._has_end = b"", False
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._take,
                "on_part_end": lambda: self._whole.add(self._name),
                "on_end": self._end,
            },
        )

    def push(self, chunk: bytes) -> None:
        """Take the next bytes. Raises RequestError, PermissionDenied; answers 413 where the file is too large."""
        try:
            self._parser.write(chunk)
        except FormParserError as e:
            raise RequestError(f"the form cannot be read: {e}") from e
        most = MAX_BYTES[self._purpose()] if "purpose" in self._whole else max(MAX_BYTES.values())
        if self._writer.num_bytes > most:
            raise HTTPException(413, f"the file is larger than {most >> 20} MiB, the most for its purpose; divide it")

    def end(self) -> FileFields:
        """Check the form as a whole. Raises RequestError, PermissionDenied."""
        if not self._has_end:
            raise RequestError("the form has no end: send it whole")
        if self._filename is None:
            raise RequestError("the form has no file", "file")
        if not self._writer.num_bytes:
            raise RequestError("the file is empty", "file")
        purpose = self._purpose()
        self.push(b"")  # the purpose may have come last
        return FileFields(self._filename, purpose, self._expiry())

    def _begin(self) -> None:
        self._name, self._disposition = "", b""
        self._header.clear()
        self._value.clear()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self._filename is not None:
                raise RequestError("the form has two files: send one a request", "file")
            given = options.get(b"filename", b"").decode(errors="replace").rpartition("/")[2]
            self._filename = "".join(char for char in given if char.isprintable())[:_MAX_NAME] or "file"
        elif name not in _FIELDS:
            raise RequestError(f"the form has the field {shown(name)}; fields are {', '.join(sorted(_FIELDS))}", name)
        elif name in self._fields:
            raise RequestError(f"the form has the field {name} twice", name)
        else:
            self._fields[name] = bytearray()

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._writer.take(data[start:end])
            return
        field = self._fields[self._name]
        field += data[start:end]
        if len(field) > _FIELD_BYTES:
            raise RequestError(f"the field {self._name} is too long", self._name)

    def _end(self) -> None:
        self._has_end = True

    def _purpose(self) -> Purpose:
        given = self._fields.get("purpose", b"").decode(errors="replace")
        if not given:
            raise RequestError("the form has no purpose: batch or fine-tune", "purpose")
        purpose = next((purpose for purpose in MAX_BYTES if purpose == given), None)
        if purpose is None:
            reason = "batches alone make such files" if given == "batch_output" else "no such files are kept here"
            raise RequestError(f"the purpose {shown(given)}: {reason}; send batch or fine-tune", "purpose")
        check_purpose(self._principal, purpose)
        return purpose

    def _expiry(self) -> int:
        anchor = self._fields.get(_ANCHOR, b"created_at").decode(errors="replace")
        given = self._fields.get(_SECONDS, str(DEFAULT_EXPIRY_S).encode()).decode(errors="replace")
        if anchor != "created_at":
            raise RequestError("expires_after.anchor must be created_at", "expires_after")
        seconds = int(given) if given.isascii() and given.isdigit() and len(given) < 9 else 0
        if not SHORTEST_EXPIRY_S <= seconds <= LONGEST_EXPIRY_S:
            raise RequestError(
                f"expires_after.seconds must be a whole number from {SHORTEST_EXPIRY_S:,} to {LONGEST_EXPIRY_S:,}",
                "expires_after",
            )
        return seconds


async def receive(request: Request, storage: FileStorage, principal: Principal) -> UserFile:
    """Receive a file. Raises RequestError, PermissionDenied, LimitExceeded, StoreError, Overloaded, KeyRevoked."""
    async with storage.uploads.one(principal.tenant):
        writer = await storage.ask(principal, lambda catalog: FileWriter(catalog, storage.store))
        try:
            form = FileForm(request.headers.get("content-type", ""), writer, principal)
            async for chunk in request.stream():
                if request.state.revoked.done():
                    raise KeyRevoked("the API key was revoked or blocked while the file came")
                form.push(chunk)
                if writer.is_due:
                    await storage.run(writer.send)
            filename, purpose, expiry_s = form.end()
            return await storage.run(lambda: writer.finish(filename, purpose, expires_after_s=expiry_s))
        except BaseException:
            await storage.run(writer.give_up)
            raise
