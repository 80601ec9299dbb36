"""The web console at /console: pages of the catalog's application, for people with a browser."""

from serve_apps.console.backend import Backend, Console, Placements
from serve_apps.console.door import CheckConsole
from serve_apps.console.live.gateway import Gateway
from serve_apps.console.live.histories import Histories
from serve_apps.console.live.streams import Streams
from serve_apps.console.receiving import receive_upload
from serve_apps.console.rendering import Renderer
from serve_apps.console.sessions import Sessions
from serve_apps.console.site import ROUTES

__all__ = [
    "ROUTES",
    "Backend",
    "CheckConsole",
    "Console",
    "Gateway",
    "Histories",
    "Placements",
    "Renderer",
    "Sessions",
    "Streams",
    "receive_upload",
]
