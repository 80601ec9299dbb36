"""Pages as the site's Markdown wants them: links to other places of the repository, fences, lists and tables.

The pages are written for GitHub's Markdown. Python-Markdown wants an empty line before a list or table, and knows no
further words behind a fence's language.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence

_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})(\w*)")
_LIST = re.compile(r"^(?:[-*+]|\d+\.) ")
FOLDER_PAGES = {"docs/decisions": "decisions/index.md", "examples": "examples.md"}
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}


def prose_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Lines of a page, and whether each is outside of fenced blocks."""
    fence = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if found and not fence:
            fence = found[1]
            yield line, False
        elif found and line.strip().startswith(fence) and line.strip() == found[1]:
            fence = ""
            yield line, False
        else:
            yield line, not fence


def links(text: str) -> list[str]:
    """Targets of a page's links, outside of fenced blocks and without those to other sites."""
    prose = "\n".join(line for line, outside in prose_lines(text) if outside)
    return [target for target in _LINK.findall(prose) if not re.match(r"[a-z]+:", target)]


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and Python-Markdown make them."""
    titles = [line.lstrip("#") for line, outside in prose_lines(text) if outside and line.startswith("#")]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.strip().lower())) for title in titles}


def repository_path(page: str, target: str) -> str:
    """The path in the repository that the link `target` of the file `page` names; its anchor is left out."""
    path = target.partition("#")[0]
    return page if not path else posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def site_path(path: str) -> str:
    """Where the site has the repository's file or folder `path`: a page for each file of text outside of docs/."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path in FOLDER_PAGES:
        return FOLDER_PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def for_site(text: str, page: str) -> str:
    """The repository's page `page` as the site's: see above."""
    here = posixpath.dirname(site_path(page))

    def moved(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"[a-z]+:|#", target):
            return target
        anchor = target.partition("#")[2]
        path = posixpath.relpath(site_path(repository_path(page, target)), here or ".")
        return f"{path}#{anchor}" if anchor else path

    lines: list[str] = []
    before = ""
    for line, outside in prose_lines(text):
        if outside:
            lines += [""] if _needs_space(before, line) else []
            lines.append(_LINK.sub(moved, line))
        else:
            lines.append(_bare_fence(line))
        before = line if outside else ""
    return "\n".join(lines) + "\n"


def _needs_space(before: str, line: str) -> bool:
    if not before.strip() or before.startswith((" ", "#", "|")) or _LIST.match(before):
        return False
    return bool(_LIST.match(line)) or line.startswith("|")


def _bare_fence(line: str) -> str:
    found = _FENCE.match(line)
    return found[0] if found else line


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of Markdown. Bars and line breaks in cells are written so that they stay in their cells."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
