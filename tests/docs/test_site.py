"""The documentation's site: reference from the code, links that lead somewhere, a navigation that has every page."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import click
import pytest
import yaml

from docs.site.markdown import for_site, headings, links, site_path, table
from docs.site.pages import all_pages, navigation, placed, problems, written
from docs.site.reference.limits import TABLES, limits_table
from loray import errors
from loray.cli.main import cli
from loray.recipes.defaults import METHODS, OBJECTIVES
from loray.recipes.fields import fields_of
from loray.spec import FIGURES, ServeSpec
from loray.telemetry import METRICS, TRAINING_METRICS, figure_metrics
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return all_pages(REPOSITORY)


def test_the_reference_has_everything(made: dict[str, str]) -> None:
    commands = made["reference/cli.md"]
    assert all(f"\n## loray {name}\n" in commands for name in (*cli.list_commands(click.Context(cli)), "adapters push"))
    assert "| `--data` | `FILE\\|URL` |  | Rows to train on (see `loray data show`);" in commands
    assert "\n## POST /v1/chat/completions\n" in made["reference/openai-api.md"]
    assert "\n## PUT /api/v1/adapters/{name}/aliases/{alias}\n" in made["reference/catalog-api.md"]
    assert (
        "Needs a [key](../guide/access.md#who-may-do-what) with the scope `admin`." in made["reference/catalog-api.md"]
    )
    fields = {path for method in METHODS for objective in OBJECTIVES for path in fields_of(method, objective)}
    assert not [path for path in fields if f"| `{path}` |" not in made["reference/recipes.md"]]
    assert not [name for name in ServeSpec.model_fields if f"| `{name}` |" not in made["reference/serve-spec.md"]]
    for metric in (*METRICS.values(), *TRAINING_METRICS.values(), *figure_metrics(FIGURES).values()):
        assert f"| `{metric.name}` | {metric.kind} |" in made["reference/metrics.md"]
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.LorayError):
            assert re.search(rf"^\| `{name}` \|.* \| [45]\d\d[^|]* \| [45]\d\d \|$", made["reference/errors.md"], re.M)


def test_references_inside_of_a_page_exist(made: dict[str, str]) -> None:
    for name in ("openai-api", "catalog-api", "recipes", "serve-spec"):
        page = made[f"reference/{name}.md"]
        assert {target[1:] for target in links(page) if target.startswith("#")} <= headings(page), name


def test_links_lead_somewhere() -> None:
    assert not problems(REPOSITORY)


def test_the_navigation_has_every_page(made: dict[str, str]) -> None:
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    shown = list(placed(navigation(nav, REPOSITORY)))
    assert len(shown) == len(set(shown))
    hidden = re.compile("source/|decisions/0")
    assert set(shown) == {path for path in {*made, *map(site_path, written(REPOSITORY))} if not hidden.match(path)}


def test_the_program_of_the_site_is_not_published() -> None:
    configuration = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = REPOSITORY / configuration["docs_dir"]
    assert {path.relative_to(docs).parts[0] for path in docs.rglob("*.py")} == {"site"}
    assert configuration["exclude_docs"] == "/site/"


def test_a_page_that_is_not_placed_comes_last_in_its_section(tmp_path: Path) -> None:
    (tmp_path / "docs" / "howto").mkdir(parents=True)
    for name in ("old", "new"):
        (tmp_path / "docs" / "howto" / f"{name}.md").touch()
    (tmp_path / "docs" / "other.md").touch()
    home, known = {"Home": "index.md"}, ["changes.md", "contributing.md"]
    assert navigation([home, {"How-to guides": [{"Old": "howto/old.md"}]}, {"Explanations": known}], tmp_path) == [
        home,
        {"How-to guides": [{"Old": "howto/old.md"}, "howto/new.md"]},
        {"Explanations": [*known, "other.md"]},
    ]


def test_a_page_as_the_site_has_it() -> None:
    page = (
        "Text:\n- one [link](../../README.md#measured), [two](../decisions/), [three](../../examples/demo/data.py)\n"
        "- [here](#there), [there](https://example.com)\n\n```bash up\n- [no](link.md)\n```\n"
    )
    assert for_site(page, "docs/guide/page.md") == (
        "Text:\n\n- one [link](../index.md#measured), [two](../decisions/index.md), "
        "[three](../source/examples/demo/data.py.md)\n"
        "- [here](#there), [there](https://example.com)\n\n```bash\n- [no](link.md)\n```\n"
    )
    assert headings("# What, and *how*?\n```\n# no\n```\n## `loray up`: two\n") == {"what-and-how", "loray-up-two"}
    assert links(page) == ["../../README.md#measured", "../decisions/", "../../examples/demo/data.py", "#there"]
    assert table(("a", "b"), [("x|y", "two\nlines")]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n"


def test_the_reference_has_every_table_of_limits_and_each_limit_is_in_one(made: dict[str, str]) -> None:
    assert all(f"\n{limits_table(limits)}" in made["reference/limits.md"] for limits in TABLES.values())
    found = Counter(limit.what for limits in TABLES.values() for limit in limits)
    assert set(found.values()) == {1}
