"""Which of an alias's requests its canary answers: plain decisions without HTTP and catalog."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from loray.spec import Principal


class Arm(NamedTuple):
    """One of the two versions among which a canary divides an alias's requests. `id` is the canary's."""

    id: int
    is_canary: bool


def session_of(principal: Principal, session_id: str | None, user: str | None) -> str | None:
    """What requests of one session have in common: the session that the client names, else the `user` of the body, else
    the key, also when it is rotated. Tenants have sessions of their own. None: nothing is known.
    """
    for kind, value in (("session", session_id), ("user", user), ("key", principal.account)):
        if value:
            return f"{principal.tenant}/{kind}/{value}"
    return None


def is_taken(canary: str, session: str, percent: int) -> bool:
    """Whether the canary answers this session. `canary` names it: another one draws other sessions.

    A session has one of 100 places, by its hash, and the canary the first `percent` of them: a larger share keeps the
    sessions that a smaller one had, and moves those alone that are missing.
    """
    place = int.from_bytes(blake2b(f"{canary}\0{session}".encode(), digest_size=8).digest()) % 100
    return place < percent
