"""What a batch has been answered so far, in the store, and the files that are made of it at its end.

    files/TENANT/.batches/ID/…   a chunk: a list of [line, whether it failed], then a row for each

Chunks are never changed. A runner that was killed, or lost its lease without knowing, may leave a line in two of them;
the first one counts, so that each line is in the output once.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal, NamedTuple

from loray.catalog import Catalog
from loray.catalog.batches import Batch
from loray.catalog.files import UserFile
from loray.catalog.leases import Lease
from loray.publishing.user_files import FILES, FileWriter
from loray.spec import Principal
from loray.store.objects import ObjectStore
from serve_apps.batches.lines import LineAnswer
from serve_apps.batches.validation import Line, lines_of


class Result(NamedTuple):
    """The row of one line, as the output file has it."""

    number: int
    has_failed: bool
    row: str

    @classmethod
    def of(cls, line: Line, answer: LineAnswer) -> Result:
        response = {"status_code": answer.status, "request_id": answer.request_id, "body": json.loads(answer.body)}
        return cls(line.number, answer.status >= 400, _row(line.custom_id, response, None))


class Answered(NamedTuple):
    """The lines that have an answer."""

    numbers: set[int]
    num_failed: int


def put_chunk(store: ObjectStore, batch: Batch, results: list[Result]) -> None:
    """Keep results. Raises StoreError."""
    head = json.dumps([[result.number, result.has_failed] for result in results])
    name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    store.put_if_absent(f"{_prefix(batch)}{name}", "\n".join([head, *(r.row for r in results)]).encode())


def read_answered(store: ObjectStore, batch: Batch) -> Answered:
    """Find what has been answered before."""
    numbers, num_failed = set[int](), 0
    for result in _results(store, batch):
        numbers.add(result.number)
        num_failed += result.has_failed
    return Answered(numbers, num_failed)


def write_files(catalog: Catalog, store: ObjectStore, batch: Batch, file: UserFile, lease: Lease) -> None:
    """Write the output and error files, and end the batch with them. Raises ConflictError where the lease has ended."""
    state: Literal["completed", "expired", "cancelled"] = "completed"
    principal = Principal(tenant=batch.tenant, actor="batches")
    counts, numbers = {False: 0, True: 0}, set[int]()
    with ExitStack() as held:
        writers: dict[bool, FileWriter] = {}

        def write(has_failed: bool, row: str) -> None:
            if has_failed not in writers:
                writer = FileWriter(catalog.view(principal), store, is_limited=False)
                writers[has_failed] = held.enter_context(writer)
            writers[has_failed].write(f"{row}\n".encode())
            counts[has_failed] += 1

        for result in _results(store, batch):
            numbers.add(result.number)
            write(result.has_failed, result.row)
        if batch.state == "cancelling":
            state = "cancelled"
        elif len(numbers) < batch.total:
            state = "expired"
            error = {"code": "batch_expired", "message": "this request was not answered in the batch's 24 hours"}
            for line in lines_of(store, file):
                if line.number not in numbers:
                    write(True, _row(line.custom_id, None, error))
        made = {
            has_failed: writer.end(
                f"{batch.id}_{'error' if has_failed else 'output'}.jsonl",
                "batch_output",
                expires_after_s=batch.output_expires_after,
            )
            for has_failed, writer in writers.items()
        }
        catalog.batches.end(
            lease, batch.id, state, counts[False], counts[True], output=made.get(False), errors=made.get(True)
        )
    remove_chunks(store, batch)


def remove_chunks(store: ObjectStore, batch: Batch) -> None:
    for key in list(store.list(_prefix(batch))):
        store.delete(key)


def _results(store: ObjectStore, batch: Batch) -> Iterator[Result]:
    """Yield each line's first result."""
    seen: set[int] = set()
    for key in sorted(store.list(_prefix(batch))):
        head, *rows = store.get(key).decode().split("\n")
        for (number, has_failed), row in zip(json.loads(head), rows, strict=True):
            if number not in seen:
                seen.add(number)
                yield Result(number, has_failed, row)


def _row(custom_id: str, response: dict[str, object] | None, error: dict[str, str] | None) -> str:
    row = {"id": f"batch_req_{secrets.token_hex(16)}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(row, ensure_ascii=True, separators=(",", ":"))


def _prefix(batch: Batch) -> str:
    return f"{FILES}/{batch.tenant}/.batches/{batch.id}/"
