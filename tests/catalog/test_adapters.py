"""Names of tenants: whose exist for whom, who may change them, register bytes, set tags, and hand them over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loray.catalog import Catalog, Registration
from loray.catalog.adapters import MAX_TAGS
from loray.errors import AdapterNotFound, ConflictError, JobNotFound, NotFoundError, PermissionDenied, SpecError
from loray.recipes.load import load_recipe
from loray.spec import SCOPES, Evaluation, Principal, RopeParameters, Visibility
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
    catalog.adapters.record_upload(digest(number))
    publish(catalog, name, number, aliases=aliases)


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    """The view of tenant acme, which has `tone`, version 1; the default tenant has a `tone` with two."""
    for name in ("acme", "beta"):
        catalog.tenants.create(name)
    publish(catalog, "tone", 2, 3)
    view = catalog.view(ACME)
    bring(view, "tone", 1)
    return view


def test_a_bare_name_is_the_own_tenants(catalog: Catalog, acme: Catalog) -> None:
    assert acme.adapters.resolve("tone").label == acme.adapters.resolve("acme/tone").label == "acme/tone@1"
    assert catalog.adapters.resolve("tone").label == "tone@2"
    assert catalog.adapters.resolve("acme/tone@1").digest == digest(1)
    assert [e.name for e in acme.snapshot().models()] == [e.name for e in acme.adapters.page(limit=9)] == ["acme/tone"]
    assert [e.name for e in catalog.adapters.page(limit=9)] == ["acme/tone", "tone"]
    assert [e.name for e in catalog.adapters.page(limit=9, tenant="default")] == ["tone"]
    publish(catalog, "house", 4)
    catalog.adapters.share("house", "shared", ["acme"])
    assert acme.adapters.resolve("house").label == acme.adapters.resolve("default/house").label == "house@1"
    bring(acme, "house", 5)
    assert acme.adapters.resolve("house").label == "acme/house@1"
    assert acme.adapters.resolve("default/house").digest == digest(4)


def test_many_are_registered_in_one_transaction_and_a_refusal_concerns_one(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    catalog.adapters.register("gone", digest(7), manifest(7))
    catalog.removal.delete_adapter("gone")
    scaled = manifest(3).model_copy(
        update={"rope_parameters": RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0)}
    )
    before = catalog.change_counter()
    found = catalog.adapters.register_many(
        [
            Registration("tone", digest(2), manifest(2), ("prod",)),
            Registration("long", digest(3), scaled, ("prod",)),
            Registration("gone", digest(4), manifest(4)),
            Registration("acme", digest(5), manifest(5), ("no alias!",)),
            Registration("beta", digest(6), manifest(6)),
        ]
    )
    assert [getattr(each, "label", type(each).__name__) for each in found] == [
        *("tone@2", "GateRefused", "ConflictError", "SpecError", "beta@1"),
    ]
    assert [entry.name for entry in catalog.adapters.page(limit=9)] == ["beta", "tone"]
    assert catalog.adapters.resolve("tone@prod").digest == digest(2)
    assert catalog.change_counter() > before


@pytest.mark.parametrize(
    ("visibility", "shared_with", "seen_by"),
    [("private", [], set()), ("shared", ["beta"], {"beta"}), ("public", [], {"beta", "default"})],
)
def test_who_sees_an_adapter(
    catalog: Catalog, acme: Catalog, visibility: Visibility, shared_with: list[str], seen_by: set[str]
) -> None:
    bring(acme, "mood", 6, aliases=("prod",))
    entry = acme.adapters.share("mood", visibility, shared_with)
    assert (entry.visibility, entry.shared_with) == (visibility, frozenset(shared_with))
    whole = catalog.snapshot()
    for principal in (ACME, BETA, HOUSE):
        view = catalog.view(principal)
        seen = principal.tenant in seen_by | {"acme"}
        for read in (view.adapters.resolve, view.adapters.get, lambda name, p=principal: whole.entry(name, p)):
            if seen:
                read("acme/mood")
            else:
                refused(AdapterNotFound, r"^no adapter 'acme/mood'", read, "acme/mood")
        own = view.snapshot()
        assert ("acme/mood" in own.adapters) == seen
        assert set(own.adapters) == {e.name for e in whole.models(principal=principal)}
        assert {e.name for e in view.adapters.page(limit=9)} == set(own.adapters)
        shown = own.adapters["acme/mood"].shared_with if seen else frozenset()
        assert shown == (frozenset(shared_with) if principal is ACME else frozenset())


OPERATIONS: dict[str, Callable[[Catalog, str], object]] = {
    "resolve": lambda c, name: c.adapters.resolve(name),
    "version": lambda c, name: c.adapters.resolve(f"{name}@1"),
    "alias": lambda c, name: c.aliases.get(name, "prod"),
    "aliases": lambda c, name: c.aliases.of(name),
    "versions": lambda c, name: c.adapters.versions(name, limit=9),
    "moves": lambda c, name: c.aliases.moves(name),
    "one version": lambda c, name: c.adapters.version(name, 1),
    "register": lambda c, name: c.adapters.register(name, digest(7), manifest(7)),
    "check_name": lambda c, name: c.adapters.check_name(name),
    "promote": lambda c, name: c.aliases.move(name, "prod", 1),
    "rollback": lambda c, name: c.aliases.rollback(name),
    "delete_alias": lambda c, name: c.aliases.delete(name, "prod"),
    "canary": lambda c, name: c.canaries.get(name),
    "set_canary": lambda c, name: c.canaries.set(name, "prod", 1, 10),
    "end_canary": lambda c, name: c.canaries.end(name),
    "share": lambda c, name: c.adapters.share(name, "public"),
    "snapshot": lambda c, name: c.snapshot().resolve(name, BETA),
}
WRITES = ("register", "check_name", "promote", "rollback", "delete_alias", "set_canary", "end_canary", "share")


def test_anothers_adapter_is_as_unknown_as_any(catalog: Catalog, acme: Catalog) -> None:
    bring(acme, "tone", 8, aliases=("prod",))
    beta = catalog.view(BETA)
    beta.adapters.record_upload(digest(7))
    before = catalog.snapshot()
    for operation, call in OPERATIONS.items():
        for name in ("acme/tone", "acme/nope"):
            with pytest.raises(AdapterNotFound) as told:
                call(beta, name)
            assert str(told.value) == f"no adapter '{name}'; `loray adapters ls` lists them", operation
        assert catalog.snapshot() == before, operation


def test_another_tenant_reads_what_it_sees_and_changes_nothing(catalog: Catalog, acme: Catalog) -> None:
    bring(acme, "tone", 8, aliases=("prod",))
    acme.adapters.share("tone", "shared", ["beta"])
    beta = catalog.view(BETA)
    before = catalog.snapshot()
    for operation in WRITES:
        refused(PermissionDenied, "another tenant", OPERATIONS[operation], beta, "acme/tone")
        assert catalog.snapshot() == before, operation
        assert beta.aliases.get("acme/tone", "prod").version == 2, operation


def test_what_a_canary_counts_is_its_tenants(catalog: Catalog, acme: Catalog) -> None:
    bring(acme, "tone", 8, aliases=("prod",))
    acme.adapters.share("tone", "public")
    started = acme.canaries.set("tone", "prod", 1, 10)
    beta = catalog.view(BETA)
    refused(PermissionDenied, "another tenant", beta.canaries.get, "acme/tone")
    assert beta.canaries.of("acme/tone") == ()
    assert beta.aliases.get("acme/tone", "prod").weights == {2: 90, 1: 10}
    for view in (acme, catalog):
        assert view.canaries.of("acme/tone") == (started,)


def test_similar_names_are_the_callers(catalog: Catalog, acme: Catalog) -> None:
    whole = catalog.snapshot()
    for source in (acme.adapters.resolve, lambda model: whole.resolve(model, ACME)):
        refused(AdapterNotFound, "did you mean 'acme/tone'", source, "tune")
    for source in (catalog.view(BETA).adapters.resolve, lambda model: whole.resolve(model, BETA)):
        for name in ("tune", "acme/tune", "default/tune"):
            refused(AdapterNotFound, "lists them", source, name)


def test_a_digest_is_registered_by_those_who_brought_it_or_see_it(catalog: Catalog, acme: Catalog) -> None:
    beta = catalog.view(BETA)
    said = set()
    for number in (1, 2, 99):  # acme's, the default tenant's, nobody's
        for attempt in (beta.adapters.check_digest, lambda d: beta.adapters.register("mine", d, manifest(), ["prod"])):
            with pytest.raises(NotFoundError) as told:
                attempt(digest(number))
            said.add(str(told.value).replace(digest(number)[:12], "DIGEST"))
    assert len(said) == 1
    assert tuple(beta.snapshot().models()) == ()
    acme.adapters.share("tone", "public")
    assert beta.adapters.register("mine", digest(1), manifest(1)).label == "beta/mine@1"
    beta.adapters.record_upload(digest(2))
    beta.adapters.record_upload(digest(2))
    assert beta.adapters.register("mine", digest(2), manifest(2)).version == 2
    assert catalog.adapters.register("beta/mine", digest(99), manifest(99)).label == "beta/mine@3"  # an administrator
    refused(SpecError, "no tenant 'gamma'", catalog.adapters.register, "gamma/mine", digest(99), manifest(99))


def test_who_registers_what_is_shared_is_not_told_how_it_was_made(catalog: Catalog, acme: Catalog) -> None:
    beta, made = catalog.view(BETA), manifest(7).model_copy(update={"job_id": "train_7", "data_fingerprint": digest(8)})
    acme.adapters.record_upload(digest(7))
    acme.adapters.register("made", digest(7), made)
    acme.adapters.share("made", "public")
    for name in ("mine", "again"):
        told = beta.adapters.register(name, digest(7), made).manifest
        assert told == beta.adapters.version(name, 1).manifest == manifest(7)
    assert acme.adapters.register("copy", digest(7), made).manifest == made
    beta.adapters.record_upload(digest(7))
    assert beta.adapters.register("brought", digest(7), made).manifest == made


def test_a_member_takes_no_base_name(catalog: Catalog, acme: Catalog) -> None:
    refused(PermissionDenied, "an administrator adds it", acme.bases.add, "tone", BASE)
    catalog.bases.add("smollm2", BASE)
    acme.bases.add("smollm2", BASE)
    acme.bases.add("other", BASE)  # its weights are known, and the name stays free
    assert catalog.bases.fingerprints() == {"smollm2": BASE}
    refused(ConflictError, "fingerprint", acme.bases.add, "smollm2", "0" * 64)
    for view in (acme, catalog.view(HOUSE)):
        refused(ConflictError, "base model's name", view.adapters.check_name, "smollm2")
    bring(acme, "mistral", 4)
    catalog.bases.add("mistral", "1" * 64)  # another tenant's adapter is no obstacle


def test_a_base_is_a_form_of_one_other(catalog: Catalog, acme: Catalog) -> None:
    int8 = "8" * 64
    catalog.bases.add("smollm2", BASE)
    catalog.bases.add("smollm2-int8", int8)
    acme.bases.add("smollm2-int8", int8, BASE)  # only an administrator says whose form it is
    assert catalog.bases.forms() == {}
    before = catalog.change_counter()
    catalog.bases.add("smollm2-int8", int8, BASE)
    assert catalog.change_counter() > before
    catalog.bases.add("smollm2-int8", int8)  # who does not know it takes nothing away
    catalog.bases.add("smollm2-fp8", "f" * 64, BASE)
    assert catalog.bases.forms() == {int8: BASE, "f" * 64: BASE}
    refused(ConflictError, "as a form of", catalog.bases.add, "smollm2-int8", int8, "0" * 64)


def test_evaluations_and_pairs_stay_with_their_tenant(catalog: Catalog, acme: Catalog) -> None:
    beta = catalog.view(BETA)
    bring(beta, "copy", 1)
    acme.evaluations.record(digest(1), [MEASURED])
    assert acme.adapters.version("tone", 1).evaluations == (MEASURED,)
    assert beta.adapters.version("copy", 1).evaluations == ()
    refused(AdapterNotFound, "", beta.evaluations.record, digest(2), [MEASURED])
    catalog.evaluations.record(digest(1), [MEASURED])  # an administrator, for whoever has it
    assert len(acme.adapters.version("tone", 1).evaluations) == 2
    assert len(beta.adapters.version("copy", 1).evaluations) == 1
    for view, number, key in ((beta, 11, 5), (acme, 12, 6), (acme, 13, 5), (catalog, 14, 0)):
        view.adapters.record_upload(digest(number))
        view.adapters.register("vera", digest(number), vera_manifest(number, key=key))
    assert [p.key for p in acme.bases.projections(BASE)] == [6, 5, 0]
    assert [p.key for p in beta.bases.projections(BASE)] == [5, 0]
    assert [p.key for p in catalog.bases.projections(BASE)] == [5, 6, 0]


def test_jobs_are_their_tenants(catalog: Catalog, acme: Catalog) -> None:
    beta = catalog.view(BETA)
    job = acme.jobs.add("job-1", name=RECIPE.name, recipe=RECIPE)
    assert (job.tenant, job.name, job.actor) == ("acme", f"acme/{RECIPE.name}", "ann")
    beta.jobs.add("job-2", name=RECIPE.name, recipe=RECIPE)
    for attempt in (beta.jobs.get, beta.jobs.start, lambda id: beta.jobs.end(id, "stopped")):
        refused(JobNotFound, "", attempt, "job-1")
    assert [j.id for j in beta.jobs.page().items] == ["job-2"]
    assert [j.id for j in acme.jobs.page(name=RECIPE.name).items] == ["job-1"]
    assert beta.jobs.page(name=f"acme/{RECIPE.name}").items == ()
    refused(SpecError, "no cursor", beta.jobs.page, cursor="job-1")
    refused(ConflictError, "taken", beta.jobs.add, "job-1", name=RECIPE.name, recipe=RECIPE)
    assert {j.id for j in catalog.jobs.page().items} == {"job-1", "job-2"}
    assert catalog.jobs.add("job-1", name=RECIPE.name, recipe=RECIPE).tenant == "acme"  # as its driver does
    assert catalog.jobs.end("job-1", "failed").tenant == "acme"


def test_the_audit_log_has_the_tenant_and_who(catalog: Catalog, acme: Catalog) -> None:
    acme.aliases.move("tone", "prod", 1)
    bring(acme, "tone", 8, aliases=("prod",))
    acme.aliases.rollback("tone")
    acme.adapters.share("tone", "shared", ["beta"])
    acme.adapters.share("tone", "shared", ["beta", "acme"])  # which changes nothing
    catalog.aliases.delete("acme/tone", "prod")
    entries = reversed(catalog.audit.page(tenant="acme").items)
    assert [(e.actor, e.action, e.subject) for e in entries if e.action != "create_tenant"] == [
        ("ann", "register", "acme/tone@1"),
        ("ann", "promote", "acme/tone@prod"),
        ("ann", "register", "acme/tone@2"),
        ("ann", "promote", "acme/tone@prod"),
        ("ann", "rollback", "acme/tone@prod"),
        ("ann", "share", "acme/tone"),
        ("local", "delete_alias", "acme/tone@prod"),
    ]


def test_bad_shares(acme: Catalog) -> None:
    bad: list[tuple[Visibility, list[str]]] = [("shared", []), ("public", ["beta"]), ("shared", ["a/b"])]
    for visibility, shared_with in bad:
        refused(SpecError, r"shared_with|tenant's name", acme.adapters.share, "tone", visibility, shared_with)


def test_tags_are_set_changed_and_taken_away(catalog: Catalog, acme: Catalog) -> None:
    counter = catalog.change_counter()
    assert acme.tags.set("tone", "team", "support")
    assert acme.tags.set("tone", "stage", "")
    assert not acme.tags.set("tone", "team", "sales")
    assert not acme.tags.set("tone", "team", "sales")
    assert list(acme.tags.of("tone").items()) == [("stage", ""), ("team", "sales")]
    assert [e.name for e in acme.adapters.page(limit=9, tags={"team": "sales", "stage": None})] == ["acme/tone"]
    acme.tags.delete("tone", "stage")
    refused(NotFoundError, r"no tag 'stage'; its tags: team", acme.tags.delete, "tone", "stage")
    assert catalog.change_counter() == counter  # serving does not read tags
    said = [(e.action, e.actor, e.subject, e.detail) for e in reversed(catalog.audit.page(tenant="acme").items)]
    assert said[-4:] == [
        ("set_tag", "ann", "acme/tone", {"key": "team", "value": "support"}),
        ("set_tag", "ann", "acme/tone", {"key": "stage", "value": ""}),
        ("set_tag", "ann", "acme/tone", {"key": "team", "value": "sales"}),
        ("delete_tag", "ann", "acme/tone", {"key": "stage"}),
    ]


def test_malformed_tags(acme: Catalog) -> None:
    for key, value in (("", "x"), ("a=b", "x"), ("a/b", "x"), ("k" * 97, "x"), ("k", "\x00"), ("k", "v" * 5001)):
        refused(SpecError, "is not a valid tag's", acme.tags.set, "tone", key, value)
    assert not acme.tags.of("tone")


def test_a_name_has_so_many_tags(acme: Catalog) -> None:
    for number in range(MAX_TAGS):
        acme.tags.set("tone", f"k{number}", "v")
    refused(ConflictError, "tags already", acme.tags.set, "tone", "one-more", "v")
    assert not acme.tags.set("tone", "k1", "w")


def test_who_sees_and_sets_tags(catalog: Catalog, acme: Catalog) -> None:
    acme.tags.set("tone", "team", "support")
    beta = catalog.view(BETA)
    for ask in (lambda: beta.tags.of("acme/tone"), lambda: beta.tags.set("acme/tone", "a", "b")):
        refused(AdapterNotFound, "no adapter 'acme/tone'", ask)
    acme.adapters.share("tone", "public")
    assert beta.tags.of("acme/tone") == {"team": "support"}
    refused(PermissionDenied, "", beta.tags.set, "acme/tone", "team", "mine")
    refused(PermissionDenied, "", beta.tags.delete, "acme/tone", "team")


# -- handing over -----------------------------------------------------------------------------------------------------


def test_a_name_goes_to_another_tenant(catalog: Catalog, acme: Catalog) -> None:
    measured = Evaluation(metric="loss", value=1.5, dataset="held-out")
    acme.adapters.register("tone", digest(1), vera_manifest(1, key=3), ["prod"])
    catalog.adapters.register("acme/tone", digest(2), vera_manifest(2, key=3))
    catalog.evaluations.record(digest(1), [measured])
    acme.tags.set("tone", "team", "support")
    acme.adapters.share("tone", "shared", ["beta"])
    before = catalog.snapshot()
    moved = catalog.adapters.transfer("acme/tone", "beta")
    assert (moved.name, moved.aliases, sorted(moved.versions)) == ("beta/tone", {"prod": 1}, [1, 2])
    assert (moved.visibility, moved.shared_with) == ("private", frozenset())
    beta = catalog.view(BETA)
    assert beta.adapters.resolve("tone@prod").digest == digest(1)
    assert beta.tags.of("tone") == {"team": "support"}
    assert beta.adapters.version("tone", 1).evaluations == (measured,)
    assert [p.key for p in beta.bases.projections(BASE)] == [3]
    refused(AdapterNotFound, "", acme.adapters.resolve, "tone")
    after = catalog.snapshot(before)  # what a gateway reads
    assert after == catalog.snapshot()
    assert [entry.name for entry in after.models()] == ["beta/tone", "tone"]
    told = [(e.tenant, e.subject, e.detail) for e in catalog.audit.page(action="transfer").items]
    assert told == [("beta", "beta/tone", {"of": "acme/tone"}), ("acme", "acme/tone", {"to": "beta/tone"})]
    acme.adapters.record_upload(digest(5))
    publish(acme, "tone", 5)  # the name is free
    back = catalog.adapters.transfer("beta/tone", "default", "house-tone")
    assert (back.name, back.tenant) == ("house-tone", "default")
    assert catalog.adapters.resolve("house-tone@2").digest == digest(2)


def test_visibility_stays_where_others_see_it(catalog: Catalog, acme: Catalog) -> None:
    catalog.tenants.create("gamma")
    acme.adapters.share("tone", "shared", ["beta", "gamma"])
    moved = catalog.adapters.transfer("acme/tone", "beta")
    assert (moved.visibility, moved.shared_with) == ("shared", frozenset({"gamma"}))
    assert catalog.adapters.transfer("beta/tone", "gamma").visibility == "private"


def test_transfers_that_are_refused(catalog: Catalog, acme: Catalog) -> None:
    refused(PermissionDenied, "administrator", acme.adapters.transfer, "tone", "beta")
    refused(SpecError, "belongs to tenant acme already", catalog.adapters.transfer, "acme/tone", "acme", "other")
    refused(SpecError, "no tenant 'nobody'", catalog.adapters.transfer, "acme/tone", "nobody")
    refused(SpecError, "not a valid adapter name", catalog.adapters.transfer, "acme/tone", "beta", "x/y")
    refused(AdapterNotFound, "", catalog.adapters.transfer, "acme/nope", "beta")
    catalog.bases.add("house", "0" * 64)
    refused(ConflictError, "a base model's name", catalog.adapters.transfer, "acme/tone", "default", "house")
    catalog.adapters.register("beta/tone", digest(3), vera_manifest(3, key=1))
    for said in ("is an adapter already", "was deleted"):
        refused(ConflictError, said, catalog.adapters.transfer, "acme/tone", "beta")
        if "already" in said:
            catalog.removal.delete_adapter("beta/tone")
    acme.jobs.add("job-1", name="tone", recipe=RECIPE.model_copy(update={"name": "tone"}))
    refused(ConflictError, "job-1 trains 'acme/tone'", catalog.adapters.transfer, "acme/tone", "beta", "tone-2")
    assert acme.adapters.resolve("tone").digest == digest(1)


def test_an_administrator_is_told_of_the_adapter_that_was_shared(catalog: Catalog, acme: Catalog) -> None:
    """Not of the own tenant's of the same bare name."""
    admin = catalog.view(Principal(tenant="acme", actor="ada"))
    shared = admin.adapters.share("default/tone", "public")
    assert (shared.name, shared.tenant, shared.visibility) == ("tone", "default", "public")
    assert acme.adapters.get("tone").visibility == "private"
