"""The gate before aliases of LongLoRA adapters: what it refuses, what it says, and what stays of an override."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog
from loray.catalog.aliases import failures
from loray.catalog.database import open_database
from loray.errors import AdapterNotFound, ConflictError, GateRefused
from loray.spec import AdapterManifest, Evaluation, RopeParameters
from tests.fixtures.figures import GOOD, NATIVE, OWN, figures
from tests.fixtures.versions import digest, manifest


def longlora(number: int = 0, evaluations: tuple[Evaluation, ...] = (), **fields: Any) -> AdapterManifest:
    rope = RopeParameters(rope_type="linear", rope_theta=1e5, factor=2)
    described: dict[str, Any] = {"method": "longlora", "context_length": OWN, "original_context_length": NATIVE}
    return manifest(number).model_copy(
        update=described | {"rope_parameters": rope, "evaluations": evaluations} | fields
    )


def against(values: dict[tuple[Any, int], float]) -> tuple[str, ...]:
    return failures(longlora(), figures(GOOD | values), 0.1)


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({("adapter", OWN): 9.999}, []),
        ({("adapter", OWN): 10.0}, ["its own context of 2,048 tokens its perplexity 10 is not below 10 of the base ("]),
        ({("base_scaled", OWN): 8.5}, ["is not below 8.5 of the base under its RoPE (docs, 16 windows)"]),
        ({("adapter", OWN): 13.0}, ["not below 10 of the base (", "not below 12 of the base under its RoPE"]),
        ({("adapter", NATIVE): 11.0}, []),
        (
            {("adapter", NATIVE): 11.5},
            ["native context of 1,024 tokens its perplexity 11.5 is 15.0% above 10 of the base (docs, 16 windows); 1"],
        ),
        ({("adapter", OWN): 11.0, ("adapter", NATIVE): 20.0}, ["not below 10 of the base (", "100.0% above"]),
    ],
)
def test_figures(values: dict[tuple[Any, int], float], said: list[str]) -> None:
    found = against(values)
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert part in sentence


@pytest.mark.parametrize(("missing", "context"), [(key, "own" if key[1] == OWN else "native") for key in GOOD])
def test_a_missing_figure_is_named(missing: tuple[str, int], context: str) -> None:
    (sentence,) = failures(longlora(), figures({k: v for k, v in GOOD.items() if k != missing}), 0.1)
    assert context in sentence
    assert "have not been measured on the same data" in sentence


def test_only_figures_of_the_same_data_are_compared() -> None:
    bases = figures({k: v for k, v in GOOD.items() if k[0] != "adapter"})
    adapter = {k: v for k, v in GOOD.items() if k[0] == "adapter"}
    for other in ({"data_sha256": "e" * 64}, {"stride": 128}, {"count": 8}, {"dataset": "others"}, {"metric": "loss"}):
        assert len(failures(longlora(), bases + figures(adapter, **other), 0.1)) == 2, other
    assert failures(longlora(), bases + figures(adapter), 0.1) == ()


def test_the_latest_complete_data_counts() -> None:
    good, bad = figures(GOOD), figures(GOOD | {("adapter", OWN): 20.0}, data_sha256="e" * 64)
    assert failures(longlora(), good + bad, 0.1)
    assert not failures(longlora(), bad + good, 0.1)
    assert not failures(longlora(), good + bad + good, 0.1)
    partly = figures({("adapter", OWN): 20.0}, data_sha256="f" * 64)
    assert not failures(longlora(), bad + good + partly, 0.1)
    assert failures(longlora(), good + figures({("adapter", OWN): 20.0}), 0.1)  # measured again on the same


def test_a_longer_context_is_gated_whatever_the_method() -> None:
    assert failures(manifest(), (), 0.1) == ()
    assert failures(longlora(rope_parameters=None, original_context_length=None), (), 0.1) == ()
    for method in ("lora", "vera"):
        assert len(failures(longlora(method=method), (), 0.1)) == 2


def test_without_a_native_context_there_is_nothing_to_compare_at() -> None:
    (sentence,) = failures(longlora(original_context_length=None), figures(GOOD), 0.1)
    assert "does not say which context was extended" in sentence


# -- in the catalog ---------------------------------------------------------------------------------------------------


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url)
    yield catalog
    catalog.close()


def test_an_alias_is_granted_by_the_manifests_figures(catalog: Catalog) -> None:
    assert catalog.register("long", digest(1), longlora(1, figures(GOOD)), ["prod"]).aliases == ("prod",)


def test_a_refused_registration_leaves_nothing(catalog: Catalog) -> None:
    before = catalog.snapshot()
    with pytest.raises(GateRefused) as e:
        catalog.register("long", digest(1), longlora(1), ["canary", "prod"])
    for part in (
        "alias 'canary' is refused to long@1: at its own context of 2,048 tokens",
        "at the native context of 1,024 tokens",
        "`loray eval perplexity long@1 --compare --data FILE`",
        "nothing was registered: do that without an alias first",
    ):
        assert part in str(e.value)
    assert catalog.snapshot() == before
    assert isinstance(e.value, ConflictError)


def test_measured_later_and_promoted(catalog: Catalog) -> None:
    catalog.register("long", digest(1), longlora(1, figures({("base", OWN): 10.0})))
    counter = catalog.change_counter()
    with pytest.raises(GateRefused):
        catalog.promote("long", "prod", 1)
    catalog.record_evaluations(digest(1), figures(GOOD))
    assert catalog.promote("long", "prod", 1).version == 1
    version = catalog.version("long", 1)
    assert (version.evaluations, version.later_evaluations) == (
        figures({("base", OWN): 10.0}) + figures(GOOD),
        figures(GOOD),
    )
    assert catalog.evaluations(digest(1)) == figures(GOOD)
    assert catalog.change_counter() == counter + 1  # of the promotion: evaluations are no news to serving


def test_an_adapter_of_several_names_is_measured_once(catalog: Catalog) -> None:
    catalog.register("long", digest(1), longlora(1))
    catalog.register("copy", digest(1), longlora(1))
    catalog.record_evaluations(digest(1), figures(GOOD))
    assert catalog.promote("copy", "prod", 1).version == 1
    with pytest.raises(AdapterNotFound, match="no adapter has digest 000000000000"):
        catalog.record_evaluations(digest(2), figures(GOOD))


def test_every_field_of_an_evaluation_comes_back(catalog: Catalog) -> None:
    catalog.register("tone", digest(1), manifest(1))
    measured = [
        Evaluation(
            metric="passkey_exact_match", value=0.75, dataset="passkey, seed 0", context_length=1024, depth=0.25
        ),
        Evaluation(metric="loss", value=1 / 3, dataset="held-out", subject="base_scaled"),
        *figures({("adapter", OWN): 7.123456789012345}),
    ]
    catalog.record_evaluations(digest(1), measured[:1])
    catalog.record_evaluations(digest(1), measured[1:])
    catalog.record_evaluations(digest(1), [])
    assert list(catalog.evaluations(digest(1))) == measured


def test_an_override_is_recorded_with_its_reason(catalog: Catalog, catalog_url: str) -> None:
    catalog.register("long", digest(1), longlora(1), ["prod"], no_gate="a quick run")
    catalog.register("long", digest(2), longlora(2, figures(GOOD)), ["prod"], no_gate="not needed")
    assert catalog.rollback("long").version == 1  # it had the alias already: no gate
    catalog.promote("long", "prod", 1)  # nothing moves
    moves = catalog.adapter("long").moves
    assert [(m.version, m.no_gate, m.undone) for m in moves] == [(1, "a quick run", False), (2, None, True)]
    engine = open_database(catalog_url)
    with engine.connect() as db:
        details = (
            db.execute(sa.text("SELECT detail FROM audit_log WHERE action = 'promote' ORDER BY id")).scalars().all()
        )
    engine.dispose()
    assert '"no_gate": "a quick run"' in details[0]
    assert "have not been measured" in details[0]
    assert "no_gate" not in details[1]


def test_the_share_is_a_setting(catalog: Catalog, catalog_url: str) -> None:
    catalog.register("long", digest(1), longlora(1, figures(GOOD)))
    strict = Catalog(catalog_url, gate_tolerance=0.05)
    with pytest.raises(GateRefused, match=r"is 9\.0% above 10 of the base .*; 5% is allowed"):
        strict.promote("long", "prod", 1)
    strict.close()
    assert catalog.promote("long", "prod", 1).version == 1
