"""Hooks of mkdocs: pages from outside of docs/, generated ones, and Markdown as the site wants it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from docs.site import pages
from docs.site.markdown import for_site

REPOSITORY = Path(__file__).resolve().parents[2]
_log = logging.getLogger("mkdocs.hooks.loray")  # what it warns of ends a strict build


def on_config(config: Any) -> Any:
    config.nav = pages.navigation(config.nav, REPOSITORY)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add README and the like, the reference, and the repository's files that pages link to."""
    for uri, text in pages.all_pages(REPOSITORY).items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Convert a page of docs/ itself; the others are made for the site already."""
    source = page.file.abs_src_path
    if source is None or page.file.generated_by is not None:
        return markdown
    return for_site(markdown, str(Path(source).relative_to(REPOSITORY)))


def on_post_build(config: Any) -> None:
    """Warn of links that lead nowhere in the repository, though their page in the site may exist."""
    for problem in pages.problems(REPOSITORY):
        _log.warning(problem)
