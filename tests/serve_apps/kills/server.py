"""The catalog's API as a process of its own, which the test kills: `python -m tests.serve_apps.kills.server PORT`."""

from __future__ import annotations

import sys

import uvicorn

from loray.settings import Settings
from loray.telemetry import configure_logging
from serve_apps.accounting.access_log import log_access
from serve_apps.api.services import Services
from serve_apps.api.site import create_app
from serve_apps.auth import open_auth
from tests.fixtures.api import FakeJobs, FakePlacements, mounted

HOST = "127.0.0.1"


def main() -> None:
    settings = Settings.from_env()
    configure_logging(settings.log_level)
    api = create_app(Services(settings, FakeJobs(), FakePlacements()), open_auth(settings, HOST))
    app = mounted(log_access(api, settings.access_log))
    uvicorn.run(app, host=HOST, port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
