"""Heat maps of retrieval: a cell for each depth and length, shaded by one scale for all models."""

from __future__ import annotations

from loray.spec import Evaluation
from serve_apps.console.pictures.heat_maps import NUM_SHADES, HeatMapCell, heat_maps_of


def cell(
    metric: str, value: float, length: int, depth: float, subject: str = "adapter", dataset: str = "passkey"
) -> Evaluation:
    return Evaluation.model_validate(
        {
            "metric": f"passkey_{metric}",
            "value": value,
            "dataset": dataset,
            "subject": subject,
            "context_length": length,
            "depth": depth,
        }
    )


def test_depth_by_length() -> None:
    (found,) = heat_maps_of(
        [
            Evaluation(metric="perplexity", value=9.0, dataset="pg19", context_length=1024),
            cell("exact_match", 0.0, 1024, 0.5),
            cell("exact_match", 1.0, 1024, 0.5),  # measured again
            cell("exact_match", 0.25, 2048, 1.0),
        ]
    )
    assert (found.title, found.lengths) == ("passkey, adapter: exact match", (1024, 2048))
    assert found.rows == (("50%", (HeatMapCell("100%", NUM_SHADES - 1), None)), ("100%", (None, HeatMapCell("25%", 1))))


def test_models_have_one_scale() -> None:
    base, adapter = heat_maps_of(
        [cell("log_likelihood", -20.0, 1024, 0.0, "base_scaled"), cell("log_likelihood", -0.01, 1024, 0.0)]
    )
    assert (base.title, base.rows[0][1]) == (
        "passkey, base scaled: log-likelihood of the key",
        (HeatMapCell("−20.0", 0),),
    )
    assert adapter.rows[0][1] == (HeatMapCell("0.0", NUM_SHADES - 1),)


def test_datasets_are_apart() -> None:
    measured = [cell("exact_match", share, 1024, 0.5, dataset=f"passkey, seed {share:.0f}") for share in (0.0, 1.0)]
    maps = heat_maps_of([*measured, cell("exact_match", 0.5, 1024, 0.5, dataset="mine")])
    assert [found.title.partition(": ")[0] for found in maps] == [
        "passkey, seed 0, adapter",
        "passkey, seed 1, adapter",
        "passkey in mine, adapter",
    ]
    assert [found.rows[0][1][0] for found in maps] == [
        HeatMapCell("0%", 0),
        HeatMapCell("100%", 5),
        HeatMapCell("50%", 3),
    ]


def test_a_map_is_bounded() -> None:
    (found,) = heat_maps_of(cell("exact_match", 1.0, 2 + n, m / 99) for n in range(100) for m in range(100))
    assert (len(found.lengths), found.lengths[0], found.lengths[-1], len(found.rows)) == (16, 2, 101, 32)
