"""What of accessibility can be seen without a browser: names, headings, landmarks, and contrast in both themes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import serve_apps.console
from tests.serve_apps.console.colours import Theme
from tests.serve_apps.console.markup import Element, parse, problems_of
from tests.serve_apps.console.site import COMPARED, PAGES, ConsoleSite

_CSS = (Path(serve_apps.console.__file__).parent / "static" / "console.css").read_text()
_SURFACE, _PAGE, _HEAD = "var(--tblr-bg-surface)", "var(--tblr-body-bg)", "var(--tblr-bg-surface-tertiary)"
_BODY, _SECONDARY, _LINK = "var(--tblr-body-color)", "var(--tblr-secondary)", "var(--tblr-link-color)"


def test_every_page_can_be_used_without_seeing_it(console: ConsoleSite) -> None:
    console.log_in(console.key("admin"))
    console.train_some()
    found = {}
    for path in PAGES:
        page = console.get(path)
        assert page.headers["content-type"].startswith("text/html"), path
        found[path] = problems_of(parse(page.text))
    assert not {path: problems for path, problems in found.items() if problems}


def test_every_picture_is_also_a_table(console: ConsoleSite) -> None:
    console.train_some()
    for path in ("/serving/replicas/r1", "/usage", "/adapters/tone", "/jobs/train_1", "/jobs/sweep_1", COMPARED):
        pictures = [e for e in parse(console.get(path).text).all() if e.attributes.get("role") == "img"]
        assert pictures, path
        check_tables(pictures)


def check_tables(pictures: list[Element]) -> None:
    for picture in pictures:
        section = picture.parent
        while section is not None and section.tag != "section":
            section = section.parent
        assert section is not None
        assert list(section.all("table")), picture


def test_what_is_wrong_with_a_page_is_found() -> None:
    wrong = """<html><title>t</title><body><a href="/x"></a><header></header><nav></nav><main><h1>a</h1><h3>b</h3>
        <input id="a"><label for="b">c</label><img src="x"><svg></svg><section></section><p id="d"></p><p id="d"></p>
        <div class="table-responsive"><table><tr><th>x</th></tr></table></div></main><footer></footer></body></html>"""
    problems = "; ".join(problems_of(parse(wrong)))
    named = ("no label", "no alternative", "neither named", "without a name", "has no name", "navs are called ''")
    placed = ("comes after h1", "2 times", "no scope", "refers to 'b'", "past the navigation", "not by the keyboard")
    for said in ("no language", *named, *placed):
        assert said in problems, said


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_can_be_read(dark: bool) -> None:
    theme = Theme(dark)
    pairs: dict[str, tuple[str, ...]] = {
        "body": (_BODY, _PAGE),
        "card": (_BODY, _SURFACE),
        "secondary on the page": (_SECONDARY, _PAGE),
        "secondary on a card": (_SECONDARY, _SURFACE),
        "table's head": (_SECONDARY, _HEAD),
        "link on the page": (_LINK, _PAGE),
        "link on a card": (_LINK, _SURFACE),
        "code": ("var(--tblr-code-color)", "var(--tblr-code-bg)"),
        "code in a link": (_LINK, "var(--tblr-code-bg)"),
        "primary button": ("var(--tblr-primary-fg)", "var(--tblr-primary)"),
        "log": ("var(--tblr-light)", "var(--tblr-bg-surface-dark)"),
        "current page": (_value(".pages a[aria-current]", "color"), _value(".pages a[aria-current]", "background")),
        "pool": (_value(".heat .pool", "color"), _value(".heat .pool", "background")),
        "host": (_BODY, _value(".heat .host", "background"), _SURFACE),
        "loading": (_BODY, _value(".heat .loading", "background"), _SURFACE),
        "added": (_BODY, _value(".diff .diff-add", "background"), _SURFACE),
        "taken out": (_BODY, _value(".diff .diff-del", "background"), _SURFACE),
        "placeholder": (_value("::placeholder", "color"), "var(--tblr-bg-forms)"),
        "danger on the page": (_value(".text-danger", "color"), _PAGE),
    }
    for name in ("green", "red", "blue", "orange", "secondary", "primary"):
        pairs[f"badge {name}"] = (_value(".badge", "color"), f"var(--tblr-{name}-lt)", _SURFACE)
    for name in ("green", "orange", "red"):
        ground = f"color-mix(in oklab, var(--tblr-{name}) 10%, transparent)"
        pairs[f"status {name}"] = (_value(".status", "color"), ground, _PAGE)
    for name in ("success", "warning", "danger"):
        ground = f"color-mix(in oklab, var(--tblr-{name}) 16%, var(--tblr-bg-surface))"
        pairs[f"alert {name}"] = (_value(".alert", "--tblr-alert-color"), ground)
    too_dim = {name: round(theme.contrast(*pair), 2) for name, pair in pairs.items() if theme.contrast(*pair) < 4.5}
    assert not too_dim


def test_contrast_is_that_of_wcag() -> None:
    theme = Theme(dark=False)
    assert theme.contrast("#000", "#fff") == pytest.approx(21, abs=0.01)
    assert theme.contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.01)
    assert theme.contrast("oklch(54.6% 0.1724 254.2deg)", "#fff") == pytest.approx(
        theme.contrast("#066fd1", "#fff"), 0.02
    )
    assert theme.contrast("color-mix(in oklab, #000 50%, transparent)", "#fff") == pytest.approx(3.95, abs=0.05)


def _value(selector: str, name: str) -> str:
    """What console.css says of it."""
    for selectors, body in re.findall(r"([^{}]*)\{([^{}]*)\}", _CSS):
        if any(part.strip().endswith(selector) for part in selectors.split(",")):
            for declaration in body.split(";"):
                found, _, value = declaration.partition(":")
                if found.strip() == name:
                    return value.removesuffix("!important").replace(" !important", "").strip()
    raise AssertionError(f"console.css has no {name} for {selector}")
