"""The lines of a batch's input: what each must be, and how they are read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from loray.catalog.batches import BatchError
from loray.catalog.files import UserFile
from loray.errors import DataError
from loray.publishing.user_files import read_lines
from loray.store.objects import ObjectStore
from serve_apps.http import parse_json

MAX_LINES = 50_000
MAX_SHOWN = 100  # errors
_MAX_ID = 512


class Line(NamedTuple):
    """A valid line. `number` is that of the input, from 1 on; `body` is JSON."""

    number: int
    custom_id: str
    model: str
    body: bytes


class _Invalid(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def check_input(store: ObjectStore, file: UserFile, endpoint: str) -> tuple[int, list[BatchError]]:
    """Return the number of lines, and the first errors; without one all lines are valid."""
    total, errors, seen = 0, list[BatchError](), set[str]()
    try:
        for number, raw in enumerate(read_lines(store, file), start=1):
            if not raw.strip():
                continue
            total += 1
            if total > MAX_LINES:
                message = f"the file has more than {MAX_LINES:,} requests: divide it"
                return total, [*errors[: MAX_SHOWN - 1], BatchError("too_many_requests", message)]
            if len(errors) >= MAX_SHOWN:
                continue
            try:
                line = _checked(raw, endpoint)
                if line["custom_id"] in seen:
                    raise _Invalid("duplicate_custom_id", "another line has this custom_id", "custom_id")
                seen.add(line["custom_id"])
            except _Invalid as e:
                errors.append(BatchError(e.code, str(e), number, e.param))
    except DataError as e:
        errors.append(BatchError("invalid_json_line", str(e)))
    if not total:
        errors.append(BatchError("empty_file", "the file has no requests"))
    return total, errors


def lines_of(store: ObjectStore, file: UserFile) -> Iterator[Line]:
    """Yield the lines of a valid input."""
    for number, raw in enumerate(read_lines(store, file), start=1):
        if raw.strip():
            line = json.loads(raw)
            body = json.dumps(line["body"], ensure_ascii=False, separators=(",", ":")).encode()
            yield Line(number, line["custom_id"], line["body"].get("model", ""), body)


def _checked(raw: bytes, endpoint: str) -> dict[str, Any]:
    """Return the line as an object. Raises _Invalid."""
    try:
        line = parse_json(raw)
    except ValueError as e:
        raise _Invalid("invalid_json_line", f"the line is not valid JSON: {e}") from e
    if not isinstance(line, dict):
        raise _Invalid("invalid_json_line", "the line must be an object with custom_id, method, url and body")
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        raise _Invalid("invalid_custom_id", f"custom_id must be a text of 1 to {_MAX_ID} characters", "custom_id")
    if line.get("method") != "POST":
        raise _Invalid("invalid_method", "method must be POST", "method")
    if line.get("url") != endpoint:
        raise _Invalid("mismatched_url", f"url must be the batch's endpoint, {endpoint}", "url")
    if not isinstance(body, dict):
        raise _Invalid("invalid_body", "body must be an object, the request", "body")
    if body.get("stream"):
        raise _Invalid("stream_not_allowed", "a line of a batch has no stream: leave the field out", "body.stream")
    if not isinstance(body.get("model", ""), str):
        raise _Invalid("invalid_body", "model must be a text", "body.model")
    return line
