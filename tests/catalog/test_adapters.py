"""Names of tenants: whose exist for whom, who may change them, register bytes, set tags, and hand them over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loray.catalog import Catalog
from loray.catalog.adapters import MAX_TAGS
from loray.errors import AdapterNotFound, ConflictError, JobNotFound, NotFoundError, PermissionDenied, SpecError
from loray.recipes.load import load_recipe
from loray.spec import SCOPES, Evaluation, Principal, Visibility
from tests.fixtures.calls import refused
from tests.fixtures.versions import BASE, digest, manifest, publish, vera_manifest

MEMBER = frozenset(SCOPES) - {"admin", "act_for"}
ACME = Principal(tenant="acme", scopes=MEMBER, actor="ann")
BETA = Principal(tenant="beta", scopes=MEMBER, actor="bob")
HOUSE = Principal(scopes=MEMBER, actor="hal")
RECIPE = load_recipe("lora_smollm2").spec
MEASURED = Evaluation(metric="perplexity", value=9.5, dataset="docs", context_length=8192)


def bring(catalog: Catalog, name: str, number: int, aliases: tuple[str, ...] = ()) -> None:
    """What publishing does."""
    catalog.record_upload(digest(number))
    publish(catalog, name, number, aliases=aliases)


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    """The view of tenant acme, which has `tone`, version 1; the default tenant has a `tone` with two."""
    for name in ("acme", "beta"):
        catalog.create_tenant(name)
    publish(catalog, "tone", 2, 3)
    view = catalog.view(ACME)
    bring(view, "tone", 1)
    return view


def test_a_bare_name_is_the_own_tenants(catalog: Catalog, acme: Catalog) -> None:
    assert acme.resolve("tone").label == acme.resolve("acme/tone").label == "acme/tone@1"
    assert catalog.resolve("tone").label == "tone@2"
    assert catalog.resolve("acme/tone@1").digest == digest(1)
    assert [e.name for e in acme.adapters()] == [e.name for e in acme.names(limit=9)] == ["acme/tone"]
    assert [e.name for e in catalog.names(limit=9)] == ["acme/tone", "tone"]
    assert [e.name for e in catalog.names(limit=9, tenant="default")] == ["tone"]
    publish(catalog, "house", 4)
    catalog.share("house", "shared", ["acme"])
    assert acme.resolve("house").label == acme.resolve("default/house").label == "house@1"
    bring(acme, "house", 5)
    assert acme.resolve("house").label == "acme/house@1"
    assert acme.resolve("default/house").digest == digest(4)


@pytest.mark.parametrize(
    ("visibility", "shared_with", "seen_by"),
    [("private", [], set()), ("shared", ["beta"], {"beta"}), ("public", [], {"beta", "default"})],
)
def test_who_sees_an_adapter(
    catalog: Catalog, acme: Catalog, visibility: Visibility, shared_with: list[str], seen_by: set[str]
) -> None:
    bring(acme, "mood", 6, aliases=("prod",))
    entry = acme.share("mood", visibility, shared_with)
    assert (entry.visibility, entry.shared_with) == (visibility, frozenset(shared_with))
    whole = catalog.snapshot()
    for principal in (ACME, BETA, HOUSE):
        view = catalog.view(principal)
        seen = principal.tenant in seen_by | {"acme"}
        for read in (view.resolve, view.entry, lambda name, p=principal: whole.entry(name, p)):
            if seen:
                read("acme/mood")
            else:
                refused(AdapterNotFound, r"^no adapter 'acme/mood'", read, "acme/mood")
        own = view.snapshot()
        assert ("acme/mood" in own.adapters) == seen
        assert set(own.adapters) == {e.name for e in whole.models(principal=principal)}
        assert {e.name for e in view.names(limit=9)} == set(own.adapters)
        shown = own.adapters["acme/mood"].shared_with if seen else frozenset()
        assert shown == (frozenset(shared_with) if principal is ACME else frozenset())


OPERATIONS: dict[str, Callable[[Catalog, str], object]] = {
    "resolve": lambda c, name: c.resolve(name),
    "version": lambda c, name: c.resolve(f"{name}@1"),
    "alias": lambda c, name: c.alias(name, "prod"),
    "aliases": lambda c, name: c.aliases(name),
    "versions": lambda c, name: c.versions(name, limit=9),
    "detail": lambda c, name: c.adapter(name),
    "one version": lambda c, name: c.version(name, 1),
    "register": lambda c, name: c.register(name, digest(7), manifest(7)),
    "check_name": lambda c, name: c.check_name(name),
    "promote": lambda c, name: c.promote(name, "prod", 1),
    "rollback": lambda c, name: c.rollback(name),
    "delete_alias": lambda c, name: c.delete_alias(name, "prod"),
    "canary": lambda c, name: c.canary(name),
    "set_canary": lambda c, name: c.set_canary(name, "prod", 1, 10),
    "end_canary": lambda c, name: c.end_canary(name),
    "share": lambda c, name: c.share(name, "public"),
    "snapshot": lambda c, name: c.snapshot().resolve(name, BETA),
}
WRITES = ("register", "check_name", "promote", "rollback", "delete_alias", "set_canary", "end_canary", "share")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_anothers_adapter_is_as_unknown_as_any(catalog: Catalog, acme: Catalog, operation: str) -> None:
    bring(acme, "tone", 8, aliases=("prod",))
    beta = catalog.view(BETA)
    beta.record_upload(digest(7))
    before = catalog.snapshot()
    said = []
    for name in ("acme/tone", "acme/nope"):
        with pytest.raises(AdapterNotFound) as told:
            OPERATIONS[operation](beta, name)
        said.append(str(told.value).replace(name, "NAME"))
    assert said[0] == said[1] == "no adapter 'NAME'; `loray adapters ls` lists them"
    assert catalog.snapshot() == before


@pytest.mark.parametrize("operation", WRITES)
def test_another_tenant_reads_what_it_sees_and_changes_nothing(catalog: Catalog, acme: Catalog, operation: str) -> None:
    bring(acme, "tone", 8, aliases=("prod",))
    acme.share("tone", "shared", ["beta"])
    beta = catalog.view(BETA)
    before = catalog.snapshot()
    refused(PermissionDenied, "another tenant", OPERATIONS[operation], beta, "acme/tone")
    assert catalog.snapshot() == before
    assert beta.alias("acme/tone", "prod").version == 2


def test_what_a_canary_counts_is_its_tenants(catalog: Catalog, acme: Catalog) -> None:
    bring(acme, "tone", 8, aliases=("prod",))
    acme.share("tone", "public")
    started = acme.set_canary("tone", "prod", 1, 10)
    beta = catalog.view(BETA)
    refused(PermissionDenied, "another tenant", beta.canary, "acme/tone")
    assert beta.canaries("acme/tone") == beta.adapter("acme/tone").canaries == ()
    assert beta.alias("acme/tone", "prod").weights == {2: 90, 1: 10}
    for view in (acme, catalog):
        assert view.canaries("acme/tone") == view.adapter("acme/tone").canaries == (started,)


def test_similar_names_are_the_callers(catalog: Catalog, acme: Catalog) -> None:
    whole = catalog.snapshot()
    for source in (acme.resolve, lambda model: whole.resolve(model, ACME)):
        refused(AdapterNotFound, "did you mean 'acme/tone'", source, "tune")
    for source in (catalog.view(BETA).resolve, lambda model: whole.resolve(model, BETA)):
        for name in ("tune", "acme/tune", "default/tune"):
            refused(AdapterNotFound, "lists them", source, name)


def test_a_digest_is_registered_by_those_who_brought_it_or_see_it(catalog: Catalog, acme: Catalog) -> None:
    beta = catalog.view(BETA)
    said = set()
    for number in (1, 2, 99):  # acme's, the default tenant's, nobody's
        for attempt in (beta.check_digest, lambda d: beta.register("mine", d, manifest(), ["prod"])):
            with pytest.raises(NotFoundError) as told:
                attempt(digest(number))
            said.add(str(told.value).replace(digest(number)[:12], "DIGEST"))
    assert len(said) == 1
    assert beta.adapters() == ()
    acme.share("tone", "public")
    assert beta.register("mine", digest(1), manifest(1)).label == "beta/mine@1"
    beta.record_upload(digest(2))
    beta.record_upload(digest(2))
    assert beta.register("mine", digest(2), manifest(2)).version == 2
    assert catalog.register("beta/mine", digest(99), manifest(99)).label == "beta/mine@3"  # an administrator
    refused(SpecError, "no tenant 'gamma'", catalog.register, "gamma/mine", digest(99), manifest(99))


def test_who_registers_what_is_shared_is_not_told_how_it_was_made(catalog: Catalog, acme: Catalog) -> None:
    beta, made = catalog.view(BETA), manifest(7).model_copy(update={"job_id": "train_7", "data_fingerprint": digest(8)})
    acme.record_upload(digest(7))
    acme.register("made", digest(7), made)
    acme.share("made", "public")
    for name in ("mine", "again"):
        told = beta.register(name, digest(7), made).manifest
        assert told == beta.version(name, 1).manifest == manifest(7)
    assert acme.register("copy", digest(7), made).manifest == made
    beta.record_upload(digest(7))
    assert beta.register("brought", digest(7), made).manifest == made


def test_a_member_takes_no_base_name(catalog: Catalog, acme: Catalog) -> None:
    refused(PermissionDenied, "an administrator adds it", acme.add_base, "tone", BASE)
    catalog.add_base("smollm2", BASE)
    acme.add_base("smollm2", BASE)
    acme.add_base("other", BASE)  # its weights are known, and the name stays free
    assert catalog.bases() == {"smollm2": BASE}
    refused(ConflictError, "fingerprint", acme.add_base, "smollm2", "0" * 64)
    for view in (acme, catalog.view(HOUSE)):
        refused(ConflictError, "base model's name", view.check_name, "smollm2")
    bring(acme, "mistral", 4)
    catalog.add_base("mistral", "1" * 64)  # another tenant's adapter is no obstacle


def test_evaluations_and_pairs_stay_with_their_tenant(catalog: Catalog, acme: Catalog) -> None:
    beta = catalog.view(BETA)
    bring(beta, "copy", 1)
    acme.record_evaluations(digest(1), [MEASURED])
    assert acme.evaluations(digest(1)) == acme.version("tone", 1).evaluations == (MEASURED,)
    assert beta.evaluations(digest(1)) == beta.version("copy", 1).evaluations == ()
    refused(AdapterNotFound, "", beta.record_evaluations, digest(2), [MEASURED])
    catalog.record_evaluations(digest(1), [MEASURED])  # an administrator, for whoever has it
    assert (len(acme.evaluations(digest(1))), len(beta.evaluations(digest(1)))) == (2, 1)
    for view, number, key in ((beta, 11, 5), (acme, 12, 6), (acme, 13, 5), (catalog, 14, 0)):
        view.record_upload(digest(number))
        view.register("vera", digest(number), vera_manifest(number, key=key))
    assert [p.key for p in acme.projections(BASE)] == [6, 5, 0]
    assert [p.key for p in beta.projections(BASE)] == [5, 0]
    assert [p.key for p in catalog.projections(BASE)] == [5, 6, 0]


def test_jobs_are_their_tenants(catalog: Catalog, acme: Catalog) -> None:
    beta = catalog.view(BETA)
    job = acme.add_job("job-1", name=RECIPE.name, recipe=RECIPE)
    assert (job.tenant, job.name, job.actor) == ("acme", f"acme/{RECIPE.name}", "ann")
    beta.add_job("job-2", name=RECIPE.name, recipe=RECIPE)
    for attempt in (beta.job, beta.start_job, lambda id: beta.end_job(id, "stopped")):
        refused(JobNotFound, "", attempt, "job-1")
    assert [j.id for j in beta.jobs().jobs] == ["job-2"]
    assert [j.id for j in acme.jobs(name=RECIPE.name).jobs] == ["job-1"]
    assert beta.jobs(name=f"acme/{RECIPE.name}").jobs == ()
    refused(SpecError, "no cursor", beta.jobs, cursor="job-1")
    refused(ConflictError, "taken", beta.add_job, "job-1", name=RECIPE.name, recipe=RECIPE)
    assert {j.id for j in catalog.jobs().jobs} == {"job-1", "job-2"}
    assert catalog.add_job("job-1", name=RECIPE.name, recipe=RECIPE).tenant == "acme"  # as its driver does
    assert catalog.end_job("job-1", "failed").tenant == "acme"


def test_the_audit_log_has_the_tenant_and_who(catalog: Catalog, acme: Catalog) -> None:
    acme.promote("tone", "prod", 1)
    bring(acme, "tone", 8, aliases=("prod",))
    acme.rollback("tone")
    acme.share("tone", "shared", ["beta"])
    acme.share("tone", "shared", ["beta", "acme"])  # which changes nothing
    catalog.delete_alias("acme/tone", "prod")
    entries = reversed(catalog.audit(tenant="acme").entries)
    assert [(e.actor, e.action, e.subject) for e in entries if e.action != "create_tenant"] == [
        ("ann", "register", "acme/tone@1"),
        ("ann", "promote", "acme/tone@prod"),
        ("ann", "register", "acme/tone@2"),
        ("ann", "promote", "acme/tone@prod"),
        ("ann", "rollback", "acme/tone@prod"),
        ("ann", "share", "acme/tone"),
        ("local", "delete_alias", "acme/tone@prod"),
    ]


@pytest.mark.parametrize(("visibility", "shared_with"), [("shared", []), ("public", ["beta"]), ("shared", ["a/b"])])
def test_bad_shares(acme: Catalog, visibility: Visibility, shared_with: list[str]) -> None:
    refused(SpecError, r"shared_with|tenant's name", acme.share, "tone", visibility, shared_with)


def test_tags_are_set_changed_and_taken_away(catalog: Catalog, acme: Catalog) -> None:
    counter = catalog.change_counter()
    assert acme.set_tag("tone", "team", "support")
    assert acme.set_tag("tone", "stage", "")
    assert not acme.set_tag("tone", "team", "sales")
    assert not acme.set_tag("tone", "team", "sales")
    assert list(acme.tags("tone").items()) == [("stage", ""), ("team", "sales")]
    assert [e.name for e in acme.names(limit=9, tags={"team": "sales", "stage": None})] == ["acme/tone"]
    acme.delete_tag("tone", "stage")
    refused(NotFoundError, r"no tag 'stage'; its tags: team", acme.delete_tag, "tone", "stage")
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
    refused(SpecError, "is not a valid tag's", acme.set_tag, "tone", key, value)


def test_a_name_has_so_many_tags(acme: Catalog) -> None:
    for number in range(MAX_TAGS):
        acme.set_tag("tone", f"k{number}", "v")
    refused(ConflictError, "tags already", acme.set_tag, "tone", "one-more", "v")
    assert not acme.set_tag("tone", "k1", "w")


def test_who_sees_and_sets_tags(catalog: Catalog, acme: Catalog) -> None:
    acme.set_tag("tone", "team", "support")
    beta = catalog.view(BETA)
    for ask in (lambda: beta.tags("acme/tone"), lambda: beta.set_tag("acme/tone", "a", "b")):
        refused(AdapterNotFound, "no adapter 'acme/tone'", ask)
    acme.share("tone", "public")
    assert beta.tags("acme/tone") == {"team": "support"}
    refused(PermissionDenied, "", beta.set_tag, "acme/tone", "team", "mine")
    refused(PermissionDenied, "", beta.delete_tag, "acme/tone", "team")


# -- handing over -----------------------------------------------------------------------------------------------------


def test_a_name_goes_to_another_tenant(catalog: Catalog, acme: Catalog) -> None:
    measured = Evaluation(metric="loss", value=1.5, dataset="held-out")
    acme.register("tone", digest(1), vera_manifest(1, key=3), ["prod"])
    catalog.register("acme/tone", digest(2), vera_manifest(2, key=3))
    catalog.record_evaluations(digest(1), [measured])
    acme.set_tag("tone", "team", "support")
    acme.share("tone", "shared", ["beta"])
    before = catalog.snapshot()
    moved = catalog.transfer("acme/tone", "beta")
    assert (moved.name, moved.aliases, sorted(moved.versions)) == ("beta/tone", {"prod": 1}, [1, 2])
    assert (moved.visibility, moved.shared_with) == ("private", frozenset())
    beta = catalog.view(BETA)
    assert beta.resolve("tone@prod").digest == digest(1)
    assert beta.tags("tone") == {"team": "support"}
    assert beta.version("tone", 1).evaluations == (measured,)
    assert [p.key for p in beta.projections(BASE)] == [3]
    refused(AdapterNotFound, "", acme.resolve, "tone")
    after = catalog.snapshot(before)  # what a gateway reads
    assert after == catalog.snapshot()
    assert list(after.adapters) == ["beta/tone", "tone"]
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
    refused(PermissionDenied, "administrator", acme.transfer, "tone", "beta")
    refused(SpecError, "belongs to tenant acme already", catalog.transfer, "acme/tone", "acme", "other")
    refused(SpecError, "no tenant 'nobody'", catalog.transfer, "acme/tone", "nobody")
    refused(SpecError, "not a valid adapter name", catalog.transfer, "acme/tone", "beta", "x/y")
    refused(AdapterNotFound, "", catalog.transfer, "acme/nope", "beta")
    catalog.add_base("house", "0" * 64)
    refused(ConflictError, "a base model's name", catalog.transfer, "acme/tone", "default", "house")
    catalog.register("beta/tone", digest(3), vera_manifest(3, key=1))
    for said in ("is an adapter already", "was deleted"):
        refused(ConflictError, said, catalog.transfer, "acme/tone", "beta")
        if "already" in said:
            catalog.delete_adapter("beta/tone")
    acme.add_job("job-1", name="tone", recipe=RECIPE.model_copy(update={"name": "tone"}))
    refused(ConflictError, "job-1 trains 'acme/tone'", catalog.transfer, "acme/tone", "beta", "tone-2")
    assert acme.resolve("tone").digest == digest(1)
