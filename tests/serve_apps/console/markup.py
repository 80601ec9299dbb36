"""A page as elements, and what of it assistive technology cannot use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = frozenset({"meta", "link", "input", "br", "hr", "img", "rect", "path"})
_FIELDS = frozenset({"input", "select", "textarea"})
_REFERENCES = ("for", "aria-labelledby", "aria-describedby", "list")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element | str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Element]:
        """Elements below this one, in the order of the page; all, or those with these tags."""
        for child in self.children:
            if isinstance(child, Element):
                if not tags or child.tag in tags:
                    yield child
                yield from child.all(*tags)

    @property
    def text(self) -> str:
        if self.attributes.get("aria-hidden") == "true":
            return ""
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(parts).split())

    def is_in(self, tag: str) -> bool:
        return self.parent is not None and (self.parent.tag == tag or self.parent.is_in(tag))

    def __str__(self) -> str:
        shown = " ".join(
            f"{name}={value!r}" for name, value in self.attributes.items() if name in ("id", "name", "class")
        )
        return f"<{self.tag} {shown}> {self.text[:40]}"


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(made)
        if tag not in _VOID:
            self.at = made

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Element(tag, {name: value or "" for name, value in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        assert self.at.tag == tag, f"</{tag}> ends {self.at}"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def parse(html: str) -> Element:
    """Raises AssertionError for tags that do not nest."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.at is parser.root, f"{parser.at} is not ended"
    return parser.root


def problems_of(page: Element) -> list[str]:
    """In words; none for a page that keeps to these rules of WCAG 2.2: names, headings, landmarks, language, tables."""
    return [*_structure(page), *_references(page), *_names(page), *_tables(page)]


def _structure(page: Element) -> Iterator[str]:
    for html in page.all("html"):
        if not html.attributes.get("lang"):
            yield "the page has no language"
        if not next(html.all("title")).text:
            yield "the page has no title"
    for tag, count in (("main", 1), ("header", 1), ("footer", 1), ("h1", 1)):
        if len(list(page.all(tag))) != count:
            yield f"there is not one {tag}"
    level = 0
    for heading in page.all(*_HEADINGS):
        if int(heading.tag[1]) > level + 1:
            yield f"{heading} comes after h{level}"
        if not heading.text:
            yield f"{heading} is empty"
        level = int(heading.tag[1])
    labels = Counter(nav.attributes.get("aria-label", "") for nav in page.all("nav"))
    yield from (f"{count} navs are called {label!r}" for label, count in labels.items() if not label or count > 1)
    body = next(page.all("body"))
    first = next(iter(body.all("a", "button")))
    if not first.attributes.get("href", "").startswith("#"):
        yield "nothing leads past the navigation"


def _references(page: Element) -> Iterator[str]:
    ids = Counter(element.attributes["id"] for element in page.all() if "id" in element.attributes)
    yield from (f"the id {id!r} is there {count} times" for id, count in ids.items() if count > 1)
    for element in page.all():
        for name in _REFERENCES:
            for id in element.attributes.get(name, "").split():
                if id not in ids:
                    yield f"{element} refers to {id!r}, which is not there"
        href = element.attributes.get("href", "")
        if href.startswith("#") and href[1:] not in ids:
            yield f"{element} leads to {href!r}, which is not there"


def _names(page: Element) -> Iterator[str]:
    labelled = {label.attributes.get("for") for label in page.all("label") if label.text}
    for element in page.all():
        named = element.attributes.get("aria-label") or element.attributes.get("aria-labelledby")
        if element.tag in _FIELDS and element.attributes.get("type") != "hidden":
            if not named and element.attributes.get("id") not in labelled and not element.is_in("label"):
                yield f"{element} has no label"
        elif element.tag in ("a", "button") and not named and not element.text:
            yield f"{element} has no name"
        elif element.tag == "img" and "alt" not in element.attributes:
            yield f"{element} has no alternative text"
        elif element.tag == "svg" and element.attributes.get("aria-hidden") != "true":
            if element.attributes.get("role") != "img" or not named:
                yield f"{element} is neither named nor hidden"
        elif element.tag == "section" and not named:
            yield f"{element} is a region without a name"
        elif element.attributes.get("role") in ("img", "group", "region", "search") and not named:
            yield f"{element} has a role and no name"
        elif "table-responsive" in element.attributes.get("class", "") and "tabindex" not in element.attributes:
            yield f"{element} scrolls on a phone, and not by the keyboard"
        elif element.tag == "fieldset" and not any(legend.text for legend in element.all("legend")):
            yield f"{element} has no legend"


def _tables(page: Element) -> Iterator[str]:
    for table in page.all("table"):
        headers = list(table.all("th"))
        if not headers:
            yield f"a table {table} has no header"
        for header in headers:
            if header.attributes.get("scope") not in ("col", "row"):
                yield f"{header} has no scope"
            if not header.text:
                yield f"{header} is empty"
