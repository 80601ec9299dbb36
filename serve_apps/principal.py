"""Whose a request is, as the applications' middleware has found out."""

from __future__ import annotations

from starlette.types import Scope

from loray.spec import Principal

_NOBODY_ASKED = Principal()


def principal_of(scope: Scope) -> Principal:
    """The principal of a request's scope; where no key is needed, the administrator of the default tenant."""
    found = scope.get("state", {}).get("principal", _NOBODY_ASKED)
    assert isinstance(found, Principal)
    return found
