"""The catalog's operations on the files of tenants, whose bytes `publishing.user_files` keeps in the store.

A file exists for its own tenant alone, also where an administrator asks. It counts in `max_stored_bytes` from its first
byte until its row is gone, which is after its bytes.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, get_args

import sqlalchemy as sa

from loray.catalog.allowances import refuse_more_bytes
from loray.catalog.audit_chain import log
from loray.catalog.database import Database
from loray.catalog.queries import beyond, now
from loray.catalog.schema import batches, files, jobs
from loray.errors import LimitExceeded, PermissionDenied, RequestError, UserFileNotFound, shown
from loray.spec import Principal, Scope

Purpose = Literal["batch", "batch_output", "fine-tune"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
SCOPE_OF: Mapping[Purpose, Scope] = {"batch": "infer", "batch_output": "infer", "fine-tune": "train"}
MAX_BYTES: Mapping[Purpose, int] = {"batch": 200 << 20, "fine-tune": 512 << 20}  # of one that is uploaded
MAX_FILES = 1000  # of a tenant
DEFAULT_EXPIRY_S = 30 * 24 * 3600
ENDED = ("failed", "completed", "expired", "cancelled")  # states of batches, which need their input no more
_UPLOAD_IS_GONE = timedelta(hours=6)
_LETTERS = string.ascii_letters + string.digits


class UserFile(NamedTuple):
    """A file of a tenant, `expires_at` None: it does not end. `account`: of the key that brought it."""

    id: str
    tenant: str
    account: str | None
    filename: str
    purpose: Purpose
    bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None


class FilePage(NamedTuple):
    files: tuple[UserFile, ...]
    has_more: bool


class OutputFile(NamedTuple):
    """A file whose bytes are all stored, and which does not exist yet."""

    id: str
    filename: str
    purpose: Purpose
    sha256: str
    expires_after_s: int | None = None


class Unneeded(NamedTuple):
    """A file that nobody can read any more."""

    id: str
    tenant: str


def new_id(prefix: str) -> str:
    """`prefix-` and 24 letters and digits, which cannot be guessed."""
    return f"{prefix}-{''.join(secrets.choice(_LETTERS) for _ in range(24))}"


@dataclass
class Files:
    """The catalog's operations on files. They do not count as changes, since serving does not depend on them."""

    db: Database

    def begin(self) -> str:
        """Begin a file of the caller's tenant, and return its id. Raises LimitExceeded."""
        principal = self.db.principal
        with self.db.changing() as c:
            if principal.key_id is not None:
                count = sa.select(sa.func.count()).select_from(files).where(files.c.tenant == principal.tenant)
                if c.execute(count).scalar_one() >= MAX_FILES:
                    raise LimitExceeded(
                        f"tenant {principal.tenant} has {MAX_FILES:,} files, which is the most: delete some"
                    )
            row: dict[str, Any] = {
                "id": new_id("file"),
                "tenant": principal.tenant,
                "account": principal.account,
                "bytes": 0,
            }
            row |= {"filename": "", "purpose": "", "state": "uploading", "created_at": now()}
            c.execute(files.insert().values(row))
            return str(row["id"])

    def grow(self, file_id: str, num_bytes: int, *, is_limited: bool = True) -> None:
        """Count bytes of a file that comes, before they are stored. `is_limited`: `max_stored_bytes` bind it.

        Raises LimitExceeded where the tenant may not store them, UserFileNotFound where the file was given up.
        """
        with self.db.changing() as c:
            if is_limited:
                refuse_more_bytes(c, self.db.principal, self.db.principal.tenant, num_bytes)
            grown = files.update().where(self._own(file_id), files.c.state == "uploading")
            if not c.execute(grown.values(bytes=files.c.bytes + num_bytes)).rowcount:
                raise _unknown(file_id)

    def finish(self, file: OutputFile) -> UserFile:
        """The file exists from now on. Raises UserFileNotFound where it was given up."""
        with self.db.changing() as c:
            found = finish_file(c, file)
            log(c, self.db.actor, "add_file", file.id, tenant=found.tenant, purpose=file.purpose, bytes=found.bytes)
            return found

    def get(self, file_id: str) -> UserFile:
        """One file. Raises UserFileNotFound."""
        with self.db.reading() as c:
            return get_file(c, self.db.principal, file_id)

    def stored(self, file_id: str) -> UserFile:
        """One file of any tenant, also one that was deleted or has expired and still has its bytes: for a batch or a
        job, of which it was checked whose it is. Raises UserFileNotFound.
        """
        with self.db.reading() as c:
            row = c.execute(sa.select(files).where(files.c.id == file_id, files.c.sha256.is_not(None))).first()
        if row is None:
            raise _unknown(file_id)
        return _file(row)

    def page(
        self, *, purposes: Collection[str], limit: int, after: str | None = None, is_ascending: bool = False
    ) -> FilePage:
        """At most `limit` files by age, newest first or `is_ascending`, after the file `after`. Raises RequestError."""
        query = sa.select(files).where(_exists(self.db.principal), files.c.purpose.in_(sorted(purposes)))
        with self.db.reading() as c:
            if after is not None:
                mine = files.c.tenant == self.db.principal.tenant
                further = beyond(c, files, mine, after, is_ascending=is_ascending)
                if further is None:
                    raise RequestError(f"{shown(after)} is no file; take `last_id` of the page before", "after")
                query = query.where(further)
            order = [column if is_ascending else column.desc() for column in (files.c.created_at, files.c.id)]
            rows = c.execute(query.order_by(*order).limit(limit + 1)).all()
        return FilePage(tuple(map(_file, rows[:limit])), len(rows) > limit)

    def delete(self, file_id: str) -> None:
        """Nobody finds the file from now on; its bytes go when nothing needs them. Raises UserFileNotFound."""
        with self.db.changing() as c:
            get_file(c, self.db.principal, file_id)
            c.execute(files.update().where(files.c.id == file_id).values(state="deleted"))
            log(c, self.db.actor, "delete_file", file_id, tenant=self.db.principal.tenant)

    def give_up(self, file_id: str) -> None:
        """The upload has failed: what is stored of it is garbage."""
        with self.db.writing() as c:
            given_up = files.update().where(files.c.id == file_id, files.c.state == "uploading")
            c.execute(given_up.values(state="deleted"))

    def unneeded(self, limit: int = 100) -> list[Unneeded]:
        """Files of all tenants that were deleted, have expired or will never be complete, and no batch or job needs."""
        is_over = sa.or_(
            files.c.state == "deleted",
            files.c.expires_at < now(),
            sa.and_(files.c.state == "uploading", files.c.created_at < now() - _UPLOAD_IS_GONE),
        )
        is_read = sa.exists().where(batches.c.input_file_id == files.c.id, batches.c.state.not_in(ENDED))
        is_learned = sa.exists().where(jobs.c.status.in_(("pending", "running")), jobs.c.recipe.contains(files.c.id))
        with self.db.reading() as c:
            unread = sa.select(files.c.id, files.c.tenant).where(is_over, ~is_read, ~is_learned)
            found = c.execute(unread.limit(limit))
            return [Unneeded(*row) for row in found]

    def forget(self, file_id: str) -> None:
        """The bytes are gone, and so is the row."""
        with self.db.writing() as c:
            c.execute(files.delete().where(files.c.id == file_id))

    def _own(self, file_id: str) -> sa.ColumnElement[bool]:
        return sa.and_(files.c.id == file_id, files.c.tenant == self.db.principal.tenant)


def get_file(c: sa.Connection, principal: Principal, file_id: str) -> UserFile:
    """One file. Raises UserFileNotFound."""
    row = c.execute(sa.select(files).where(files.c.id == file_id, _exists(principal))).first()
    if row is None:
        raise _unknown(file_id)
    return _file(row)


def finish_file(c: sa.Connection, file: OutputFile) -> UserFile:
    """Make a file exist, until its expiry from its beginning on. Raises UserFileNotFound where it was given up."""
    begun = c.execute(sa.select(files).where(files.c.id == file.id, files.c.state == "uploading")).first()
    if begun is None:
        raise _unknown(file.id)
    expires_at = begun.created_at + timedelta(seconds=file.expires_after_s or DEFAULT_EXPIRY_S)
    values = {"filename": file.filename, "purpose": file.purpose, "sha256": file.sha256, "expires_at": expires_at}
    c.execute(files.update().where(files.c.id == file.id).values(values | {"state": "processed"}))
    return _file(c.execute(sa.select(files).where(files.c.id == file.id)).one())


def _exists(principal: Principal) -> sa.ColumnElement[bool]:
    return sa.and_(
        files.c.tenant == principal.tenant,
        files.c.state == "processed",
        sa.or_(files.c.expires_at.is_(None), files.c.expires_at > now()),
        files.c.purpose.in_(purposes_of(principal)),
    )


def purposes_of(principal: Principal) -> tuple[Purpose, ...]:
    """The purposes of the files that exist for this caller: a key that may not train sees no training data."""
    return tuple(p for p in PURPOSES if principal.is_admin or SCOPE_OF[p] in principal.scopes)


def check_purpose(principal: Principal, purpose: Purpose) -> None:
    """Raise PermissionDenied where no files with this purpose exist for the caller."""
    if purpose not in purposes_of(principal):
        raise PermissionDenied(f"files with the purpose {purpose} need a key with the scope {SCOPE_OF[purpose]}")


def _unknown(file_id: str) -> UserFileNotFound:
    return UserFileNotFound(f"there is no file {shown(file_id)}; GET /v1/files lists those of this key")


def _file(row: sa.Row[Any]) -> UserFile:
    return UserFile(*(getattr(row, name) for name in UserFile._fields))
