"""Which key may be replaced by another one. Policy in plain Python.

The keys that were rotated into each other are told apart by their ids: `key-ab12` is the first, `key-ab12_3` the third.
A thief who has one of them can make others, so revoking one revokes all, few go on at once, and a key replaces itself
rarely.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from loray.errors import ConflictError
from loray.spec import ApiKey

MAX_GRACE = timedelta(days=30)  # of a key that was replaced
SELF_ROTATION = timedelta(days=1)  # between two times that a key replaces itself


def refuse_rotation(old: ApiKey, family: Collection[ApiKey], now: datetime, *, is_kept: bool, by_itself: bool) -> None:
    """Raise ConflictError where `old` may not be replaced now: it is revoked or blocked, it was replaced already, it
    would be one of three that go on, or it was made by a rotation of itself less than a day ago.

    family     all keys that were rotated into each other, `old` among them
    is_kept    it is to go on for a while beside the new one
    by_itself  it is the key of the request
    """
    if old.revoked_at is not None:
        raise ConflictError(f"key {old.id!r} is revoked; create another one")
    if old.blocked:
        raise ConflictError(f"key {old.id!r} is blocked; let it pass again before it is replaced")
    others = [key for key in family if key.id != old.id and _goes_on(key, now)]
    for other in others:
        if _number_of(other.id) > _number_of(old.id):
            raise ConflictError(f"key {old.id!r} has been replaced by {other.id}; replace that one")
    if others and is_kept:
        raise ConflictError(
            f"key {others[0].id} goes on beside {old.id}, and a third one may not: revoke it alone first, or replace "
            "the key without a grace period"
        )
    if by_itself and _number_of(old.id) > 1 and now - old.created_at < SELF_ROTATION:
        raise ConflictError(
            f"key {old.id!r} was made by a rotation less than a day ago; it may replace itself after "
            f"{old.created_at + SELF_ROTATION:%Y-%m-%d %H:%M} UTC, and an administrator may do it now"
        )


def _goes_on(key: ApiKey, now: datetime) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


def _number_of(key_id: str) -> int:
    return int(key_id.partition("_")[2] or 1)
