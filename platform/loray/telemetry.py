"""Names shared by every part that logs or measures."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """A logger below `loray`, whatever package asks."""
    return logging.getLogger(name if name.startswith("loray") else f"loray.{name}")


def configure_logging(level: str) -> None:
    """For processes that loray owns (CLI, drivers, replicas). Other libraries are heard from WARNING on."""
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("loray").setLevel(level)
