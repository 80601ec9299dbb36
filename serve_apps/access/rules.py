"""Which action of `loray.serving.access` each route is. A route that is in no table is an administrator's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from loray.serving.access import Action

# (methods, or * for all; paths as a regular expression; action). The first that matches counts.
Row = tuple[str, str, Action]

_DOCUMENTS: tuple[Row, ...] = (("GET", r"/openapi\.json|/docs|/docs/oauth2-redirect|/redoc", "open"),)
GATEWAY_ROWS: tuple[Row, ...] = (
    ("GET POST", r"/ping", "open"),
    ("GET", r"/health|/version", "open"),
    *_DOCUMENTS,
    ("POST", r"/v1/(completions|chat/completions|responses)|/tokenize|/detokenize", "infer"),
    ("GET", r"/v1/models(/.+)?", "read"),
    ("POST", r"/v1/(un)?load_lora_adapter", "publish"),
    ("GET", r"/metrics|/status", "observe"),
    ("GET", r"/console", "open"),  # leads to the catalog's
)
# The console, whose session stands for a key. Pages show what their key may see.
_PAGES: tuple[Row, ...] = (
    ("GET POST", r"/console/login", "open"),
    ("GET", r"/console/static/[^/]+", "open"),
    ("POST", r"/console/logout", "identify"),
    ("GET", r"/console(/|/live)?", "identify"),
    ("POST", r"/console/adapters/[^/]+/aliases(/.*)?", "promote"),
    ("GET", r"/console/adapters(/.*)?", "read"),
    ("*", r"/console/playground(/.*)?", "infer"),
    ("*", r"/console/uploads(/.*)?", "publish"),
    ("*", r"/console/jobs(/.*)?", "train"),
    ("GET", r"/console/serving(/live|/replicas/[^/]+(/live)?)?", "observe"),
    ("GET POST", r"/console/advice(/recommend|/plan|/simulate)?", "identify"),
    ("GET", r"/console/usage", "identify"),
    ("*", r"/console/(keys|tenants)(/.*)?", "manage"),
)
API_ROWS: tuple[Row, ...] = (
    *_DOCUMENTS,
    *_PAGES,
    ("GET", r"/keys/self", "identify"),
    ("POST", r"/keys/[^/]+/rotate", "identify"),  # its route lets a key rotate itself
    ("*", r"/keys(/.*)?|/tenants(/.*)?", "manage"),
    ("GET", r"/audit", "audit"),
    ("GET", r"/usage(/.*)?", "identify"),
    ("GET", r"/recommend|/bases", "identify"),
    ("*", r"/jobs(/.*)?", "train"),
    ("GET", r"/adapters(/.*)?", "read"),
    ("*", r"/adapters/[^/]+/aliases(/.*)?", "promote"),
    ("*", r"/adapters/[^/]+/transfer", "manage"),
    ("DELETE", r"/adapters/[^/]+/versions/[^/]+/quarantine", "manage"),
    ("*", r"/adapters(/.*)?|/uploads(/.*)?", "publish"),
)


class Rules:
    """The actions of one application's routes."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [(set(methods.split()), re.compile(paths), action) for methods, paths, action in rows]

    def action(self, method: str, path: str) -> Action:
        """`path`: without the application's route prefix."""
        for methods, paths, action in self._rows:
            if (method in methods or "*" in methods) and paths.fullmatch(path):
                return action
        return "manage"

    @cached_property
    def actions(self) -> frozenset[Action]:
        return frozenset(action for _, _, action in self._rows)


GATEWAY = Rules(GATEWAY_ROWS)
API = Rules(API_ROWS)
