"""Permission stands at the route: `@may("infer")` over an endpoint says its action, one of `loray.serving.access`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from loray.serving.access import Action

_ACTION = "loray_action"
_DOCUMENT = "/openapi.json"  # FastAPI's own route
E = TypeVar("E", bound=Callable[..., object])


def may(action: Action) -> Callable[[E], E]:
    """Below the route's decorator: only who may do `action` reaches the endpoint."""

    def say(endpoint: E) -> E:
        setattr(endpoint, _ACTION, action)
        return endpoint

    return say


def action_of(route: BaseRoute) -> Action:
    """Raises TypeError for a route that does not say who may call it, and for what is no plain route."""
    action = getattr(route.endpoint, _ACTION, None) if isinstance(route, Route) else None
    if action is None and isinstance(route, Route) and not isinstance(route, APIRoute) and route.path == _DOCUMENT:
        return "open"
    if action is None:
        raise TypeError(f"{route} does not say who may call it: write @may(ACTION) over its endpoint")
    found: Action = action
    return found


class Permissions:
    """The actions of one application's routes, which is not made where one of them says none."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        """Raises TypeError as `action_of` does."""
        self._routes = [(route, action_of(route)) for route in routes]

    def action(self, scope: Scope) -> Action | None:
        """Of the request's route, which is found as the application finds it; None: there is none, for nobody."""
        for route, action in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return action
        return None

    def named(self, method: str, path: str) -> Action:
        """Of the route with this path, as the OpenAPI document spells it."""
        for route, action in self._routes:
            if isinstance(route, Route) and route.path_format == path and method in (route.methods or ()):
                return action
        raise KeyError(f"{method} {path}")
