"""Tags of names, and names that are handed to another tenant, on both databases."""

from __future__ import annotations

import pytest

from loray.catalog import Catalog
from loray.catalog.adapters import MAX_TAGS
from loray.errors import AdapterNotFound, ConflictError, NotFoundError, PermissionDenied, SpecError
from loray.recipes.load import load_recipe
from loray.spec import SCOPES, Evaluation, Principal
from tests.fixtures.versions import BASE, digest, publish, vera_manifest

MEMBER = frozenset(SCOPES) - {"admin", "act_for"}
ACME = Principal(tenant="acme", scopes=MEMBER, actor="ann")
BETA = Principal(tenant="beta", scopes=MEMBER, actor="bob")
RECIPE = load_recipe("lora_smollm2").spec


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    """The view of tenant acme, which has `tone`, version 1, with the alias prod."""
    for tenant in ("acme", "beta"):
        catalog.create_tenant(tenant)
    view = catalog.view(ACME)
    view.record_upload(digest(1))
    publish(view, "tone", 1, aliases=("prod",))
    return view


def test_tags_are_set_changed_and_taken_away(catalog: Catalog, acme: Catalog) -> None:
    counter = catalog.change_counter()
    assert acme.set_tag("tone", "team", "support")
    assert acme.set_tag("tone", "stage", "")
    assert not acme.set_tag("tone", "team", "sales")
    assert not acme.set_tag("tone", "team", "sales")
    assert list(acme.tags("tone").items()) == [("stage", ""), ("team", "sales")]
    assert [e.name for e in acme.names(limit=9, tags={"team": "sales", "stage": None})] == ["acme/tone"]
    acme.delete_tag("tone", "stage")
    with pytest.raises(NotFoundError, match=r"no tag 'stage'; its tags: team"):
        acme.delete_tag("tone", "stage")
    assert catalog.change_counter() == counter  # serving does not read tags
    said = [(e.action, e.actor, e.subject, e.detail) for e in reversed(catalog.audit(tenant="acme").entries)]
    assert said[-4:] == [
        ("set_tag", "ann", "acme/tone", {"key": "team", "value": "support"}),
        ("set_tag", "ann", "acme/tone", {"key": "stage", "value": ""}),
        ("set_tag", "ann", "acme/tone", {"key": "team", "value": "sales"}),
        ("delete_tag", "ann", "acme/tone", {"key": "stage"}),
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("", "x"), ("a=b", "x"), ("a/b", "x"), ("k" * 97, "x"), ("k", "\x00"), ("k", "v" * 5001)]
)
def test_malformed_tags(acme: Catalog, key: str, value: str) -> None:
    with pytest.raises(SpecError, match="is not a valid tag's"):
        acme.set_tag("tone", key, value)


def test_a_name_has_so_many_tags(acme: Catalog) -> None:
    for number in range(MAX_TAGS):
        acme.set_tag("tone", f"k{number}", "v")
    with pytest.raises(ConflictError, match="tags already"):
        acme.set_tag("tone", "one-more", "v")
    assert not acme.set_tag("tone", "k1", "w")


def test_who_sees_and_sets_tags(catalog: Catalog, acme: Catalog) -> None:
    acme.set_tag("tone", "team", "support")
    beta = catalog.view(BETA)
    for ask in (lambda: beta.tags("acme/tone"), lambda: beta.set_tag("acme/tone", "a", "b")):
        with pytest.raises(AdapterNotFound, match="no adapter 'acme/tone'"):
            ask()
    acme.share("tone", "public")
    assert beta.tags("acme/tone") == {"team": "support"}
    with pytest.raises(PermissionDenied):
        beta.set_tag("acme/tone", "team", "mine")
    with pytest.raises(PermissionDenied):
        beta.delete_tag("acme/tone", "team")


# -- handing over -----------------------------------------------------------------------------------------------------


def test_a_name_goes_to_another_tenant(catalog: Catalog, acme: Catalog) -> None:
    measured = Evaluation(metric="loss", value=1.5, dataset="held-out")
    acme.register("tone", digest(1), vera_manifest(1, key=3))
    catalog.register("acme/tone", digest(2), vera_manifest(2, key=3))
    catalog.record_evaluations(digest(1), [measured])
    acme.set_tag("tone", "team", "support")
    acme.share("tone", "shared", ["beta"])
    before = catalog.snapshot()
    moved = catalog.transfer("acme/tone", "beta")
    assert (moved.name, moved.tenant, moved.aliases, sorted(moved.versions)) == (
        "beta/tone",
        "beta",
        {"prod": 1},
        [1, 2],
    )
    assert (moved.visibility, moved.shared_with) == ("private", frozenset())
    beta = catalog.view(BETA)
    assert beta.resolve("tone@prod").digest == digest(1)
    assert beta.tags("tone") == {"team": "support"}
    assert beta.version("tone", 1).evaluations == (measured,)
    assert [p.key for p in beta.projections(BASE)] == [3]
    with pytest.raises(AdapterNotFound):
        acme.resolve("tone")
    after = catalog.snapshot(before)  # what a gateway reads
    assert after == catalog.snapshot()
    assert list(after.adapters) == ["beta/tone"]
    told = [(e.tenant, e.subject, e.detail) for e in catalog.audit(action="transfer").entries]
    assert told == [("beta", "beta/tone", {"of": "acme/tone"}), ("acme", "acme/tone", {"to": "beta/tone"})]
    acme.record_upload(digest(5))
    publish(acme, "tone", 5)  # the name is free
    back = catalog.transfer("beta/tone", "default", "house-tone")
    assert (back.name, back.tenant) == ("house-tone", "default")
    assert catalog.resolve("house-tone@2").digest == digest(2)


def test_visibility_stays_where_others_see_it(catalog: Catalog, acme: Catalog) -> None:
    catalog.create_tenant("gamma")
    acme.share("tone", "shared", ["beta", "gamma"])
    moved = catalog.transfer("acme/tone", "beta")
    assert (moved.visibility, moved.shared_with) == ("shared", frozenset({"gamma"}))
    assert catalog.transfer("beta/tone", "gamma").visibility == "private"


def test_transfers_that_are_refused(catalog: Catalog, acme: Catalog) -> None:
    with pytest.raises(PermissionDenied, match="administrator"):
        acme.transfer("tone", "beta")
    with pytest.raises(SpecError, match="belongs to tenant acme already"):
        catalog.transfer("acme/tone", "acme", "other")
    with pytest.raises(SpecError, match="no tenant 'nobody'"):
        catalog.transfer("acme/tone", "nobody")
    with pytest.raises(SpecError, match="not a valid adapter name"):
        catalog.transfer("acme/tone", "beta", "x/y")
    with pytest.raises(AdapterNotFound):
        catalog.transfer("acme/nope", "beta")
    catalog.add_base("house", "0" * 64)
    with pytest.raises(ConflictError, match="a base model's name"):
        catalog.transfer("acme/tone", "default", "house")
    catalog.register("beta/tone", digest(3), vera_manifest(3, key=1))
    for said in ("is an adapter already", "was deleted"):
        with pytest.raises(ConflictError, match=said):
            catalog.transfer("acme/tone", "beta")
        if "already" in said:
            catalog.delete_adapter("beta/tone")
    acme.add_job("job-1", name="tone", recipe=RECIPE.model_copy(update={"name": "tone"}))
    with pytest.raises(ConflictError, match="job-1 trains 'acme/tone'"):
        catalog.transfer("acme/tone", "beta", "tone-2")
    assert acme.resolve("tone").digest == digest(1)
