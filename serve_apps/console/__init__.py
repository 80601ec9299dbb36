"""The web console at /console: pages of the catalog's application, for people with a browser."""

from serve_apps.console.archives import receive_upload
from serve_apps.console.backend import Backend, Console, Jobs, Placements, Service, Sessions
from serve_apps.console.gateway import GatewayClient
from serve_apps.console.rendering import Renderer, Streams
from serve_apps.console.runs import Histories
from serve_apps.console.session import CheckConsole
from serve_apps.console.site import ROUTES

__all__ = [
    "ROUTES",
    "Backend",
    "CheckConsole",
    "Console",
    "GatewayClient",
    "Histories",
    "Jobs",
    "Placements",
    "Renderer",
    "Service",
    "Sessions",
    "Streams",
    "receive_upload",
]
