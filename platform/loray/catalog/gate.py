"""The gate: the measured perplexity that an adapter with a RoPE of its own needs before it gets an alias. Policy in
plain Python.

At the adapter's context, its perplexity must be below the base's, both with and without the adapter's RoPE. At the
context that was extended, it may be at most a share (`tolerance`) above the perplexity of the unscaled base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loray.spec import PERPLEXITY, AdapterManifest, Evaluation, Subject

_NAMES: Mapping[Subject, str] = {"base": "the base", "base_scaled": "the base under its RoPE", "adapter": "the adapter"}


def is_gated(manifest: AdapterManifest) -> bool:
    """An adapter that extends no context has nothing to show here, whatever attention it was trained with."""
    return manifest.rope_parameters is not None


def failures(
    manifest: AdapterManifest, evaluations: Sequence[Evaluation], tolerance: float, *, trusts_keys: bool = False
) -> tuple[str, ...]:
    """The objections to an alias, one sentence each; empty where the alias is granted.

    `evaluations` are sorted from the oldest to the latest; what clients have reported counts where the gate
    `trusts_keys`. Values are compared where they were measured on the same tokens in the same windows; of several such
    sets the latest counts.
    """
    if not is_gated(manifest):
        return ()
    evaluations = [e for e in evaluations if trusts_keys or e.measured_by is None]
    own, native = manifest.context_length, manifest.original_context_length
    return (*_at_its_own(evaluations, own), *_at_the_native(evaluations, native, tolerance))


def _at_its_own(evaluations: Sequence[Evaluation], context: int) -> list[str]:
    where = f"at its own context of {context:,} tokens"
    found = _measured(evaluations, context, ("adapter", "base", "base_scaled"))
    if not found:
        return [f"{where} adapter, base and base under its RoPE have not been measured on the same data"]
    adapter = found["adapter"]
    return [
        f"{where} its perplexity {adapter.value:.4g} is not below {found[subject].value:.4g} of {_NAMES[subject]} "
        f"({_data(adapter)})"
        for subject in ("base", "base_scaled")
        if not adapter.value < found[subject].value
    ]


def _at_the_native(evaluations: Sequence[Evaluation], context: int | None, tolerance: float) -> list[str]:
    if context is None:
        return ["its manifest does not say which context was extended: publish it again"]
    where = f"at the native context of {context:,} tokens"
    found = _measured(evaluations, context, ("adapter", "base"))
    if not found:
        return [f"{where} adapter and base have not been measured on the same data"]
    adapter, base = found["adapter"], found["base"]
    if adapter.value <= (1 + tolerance) * base.value:
        return []
    return [
        f"{where} its perplexity {adapter.value:.4g} is {adapter.value / base.value - 1:.1%} above {base.value:.4g} of "
        f"the base ({_data(adapter)}); {tolerance:.0%} is allowed"
    ]


def _measured(
    evaluations: Sequence[Evaluation], context: int, subjects: tuple[Subject, ...]
) -> Mapping[Subject, Evaluation]:
    """Evaluations by subject, from the set that was measured last and has all `subjects`; empty where none has."""
    sets: dict[tuple[object, ...], dict[Subject, Evaluation]] = {}
    for e in evaluations:
        if e.metric == PERPLEXITY and e.context_length == context:
            key = (e.dataset, e.data_sha256, e.stride, e.count)
            sets[key] = sets.pop(key, {}) | {e.subject: e}  # moves to the end: measured last
    complete = (found for found in reversed(sets.values()) if found.keys() >= set(subjects))
    return next(complete, {})


def _data(e: Evaluation) -> str:
    windows = "" if e.count is None else f", {e.count} windows"
    return f"{e.dataset}{windows}"
