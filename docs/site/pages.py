"""The pages that the site has beside those of docs/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.site.markdown import FOLDER_PAGES, ROOT_PAGES, for_site, headings, links, repository_path, site_path
from docs.site.reference import reference

_SECTIONS = {"howto": "How-to guides", "benchmarks": "Benchmarks"}  # of pages of other folders: Explanations
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}


def written(repository: Path) -> list[str]:
    """Paths of the pages that people have written: docs/ and the files at the root."""
    docs = (path for path in (repository / "docs").rglob("*.md"))
    return [*ROOT_PAGES, *sorted(str(path.relative_to(repository)) for path in docs)]


def placed(nav: Any) -> Iterator[str]:
    """Paths of the pages in a navigation, as mkdocs.yml has it."""
    if isinstance(nav, str):
        yield nav
    else:
        for below in nav.values() if isinstance(nav, dict) else nav:
            yield from placed(below)


def navigation(nav: list[dict[str, Any]], repository: Path) -> list[dict[str, Any]]:
    """`nav`, and the pages of docs/ that it does not place, each last in its folder's section."""
    known = set(placed(nav))
    others = [path for path in map(site_path, written(repository)) if path not in known]
    sections = {title: list(below) for entry in nav for title, below in entry.items() if isinstance(below, list)}
    for path in others:
        if not path.startswith("decisions/"):  # which have a list of their own
            sections[_SECTIONS.get(path.partition("/")[0], "Explanations")].append(path)
    return [{title: sections.get(title, below) for title, below in entry.items()} for entry in nav]


def problems(repository: Path) -> list[str]:
    """Links that lead nowhere: to no file or page of the reference, or to no heading of a page."""
    made = {f"docs/reference/{name}.md": text for name, text in reference().items()}
    found = []
    for page in written(repository):
        for target in links(_text(repository, page)):
            path, anchor = repository_path(page, target), target.partition("#")[2]
            if path not in made and not (repository / path).exists():
                found.append(f"{page} links to {target}, which does not exist")
            elif anchor and path.endswith(".md") and anchor not in headings(made.get(path) or _text(repository, path)):
                found.append(f"{page} links to {target}, and {path} has no such heading")
    return found


def all_pages(repository: Path) -> dict[str, str]:
    """Path in the site → Markdown, of every page that is no file of docs/."""
    made = {site_path(page): for_site(_text(repository, page), page) for page in ROOT_PAGES}
    made["decisions/index.md"] = _decisions(repository)
    made["examples.md"] = _examples(repository)
    made |= {f"reference/{name}.md": text for name, text in reference().items()}
    for page in written(repository):
        for target in links(_text(repository, page)):
            path = repository_path(page, target)
            if (
                path.startswith("docs/")
                or path in ROOT_PAGES
                or path in FOLDER_PAGES
                or not (repository / path).exists()
            ):
                continue
            made[site_path(path)] = _source(repository, path)
    return made


def _text(repository: Path, page: str) -> str:
    return (repository / page).read_text(encoding="utf-8")


def _source(repository: Path, path: str) -> str:
    """A file's text, or a folder's list of files."""
    found = repository / path
    if found.is_dir():
        names = sorted(entry.name + "/" * entry.is_dir() for entry in found.iterdir() if entry.name[0] not in "._")
        return f"# {path}/\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = found.read_text(encoding="utf-8")
    return f"# {path}\n\n````{_LANGUAGES.get(found.suffix, '')}\n{text}````\n"


def _examples(repository: Path) -> str:
    """All of them as they are."""
    parts = ["# Examples\n", "Programs that use the public APIs. A test runs each as it stands.\n"]
    for path in sorted((repository / "examples").iterdir()):
        if path.suffix in _LANGUAGES:
            text = path.read_text(encoding="utf-8")
            parts.append(f"## {path.name}\n\n````{_LANGUAGES[path.suffix]}\n{text}````\n")
    return "\n".join(parts)


def _decisions(repository: Path) -> str:
    lines = ["# Decisions", "", "One page for each decision that a reader would ask about.", ""]
    for path in sorted((repository / "docs" / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"
