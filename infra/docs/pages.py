"""Which pages the site has beside those of docs/."""

from __future__ import annotations

import re
from pathlib import Path

from infra.docs.markdown import FOLDER_PAGES, ROOT_PAGES, for_site, links, repository_path, site_path
from infra.docs.reference import reference

_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}


def written(repository: Path) -> list[str]:
    """Paths of the pages that people have written: docs/ and the files at the root."""
    docs = (path for path in (repository / "docs").rglob("*.md"))
    return [*ROOT_PAGES, *sorted(str(path.relative_to(repository)) for path in docs)]


def problems(repository: Path) -> list[str]:
    """Links that lead nowhere."""
    return [
        f"{page} links to {target}, which does not exist"
        for page in written(repository)
        for target in links((repository / page).read_text(encoding="utf-8"))
        if not (repository / repository_path(page, target)).exists()
    ]


def all_pages(repository: Path) -> dict[str, str]:
    """Path in the site → Markdown, of every page that is no file of docs/."""
    made = {site_path(page): _read(repository, page) for page in ROOT_PAGES}
    made["decisions/index.md"] = _decisions(repository)
    made["examples.md"] = _examples(repository)
    made |= {f"reference/{name}.md": text for name, text in reference().items()}
    for page in written(repository):
        for target in links((repository / page).read_text(encoding="utf-8")):
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


def _read(repository: Path, page: str) -> str:
    return for_site((repository / page).read_text(encoding="utf-8"), page)


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
        title = re.sub(r"^# ", "", path.read_text(encoding="utf-8").splitlines()[0])
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"
