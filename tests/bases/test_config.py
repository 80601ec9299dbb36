"""RoPE scaled once, and scaled again on a base that is scaled already, against the equations."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from loray.bases.config import scaled
from loray.engine.model.decoder import frequencies
from loray.spec import RopeParameters, RopeScaling

DIM = 64
PLAIN = RopeParameters(rope_theta=10000.0)
LINEAR = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=4.0)
YARN = RopeParameters(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=4096)
LLAMA3 = RopeParameters(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def plain(theta: float) -> NDArray[np.float64]:
    inverse: NDArray[np.float64] = theta ** (-np.arange(0, DIM, 2) / DIM)
    return inverse


def llama3(theta: float) -> NDArray[np.float64]:
    """Llama 3.1's: wavelengths above 8,192 divided by 8, below 2,048 kept, blended between."""
    inverse = plain(theta)
    blend = np.clip((8192 * inverse / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0, 1)
    return inverse * (blend + (1 - blend) / 8.0)


def stretched(theta: float, factor: float) -> float:
    return theta * factor ** (DIM / (DIM - 2))


@pytest.mark.parametrize(
    ("base", "kind", "expected", "temperature"),
    [
        (PLAIN, "linear", plain(1e4) / 2, 1.0),
        (LINEAR, "linear", plain(1e4) / 8, 1.0),
        (PLAIN, "ntk", plain(stretched(1e4, 2)), 1.0),
        (LINEAR, "ntk", plain(stretched(1e4, 2)) / 4, 1.0),
        (LLAMA3, "ntk", llama3(stretched(5e5, 2)), 1.0),
        (YARN, "yarn", None, 1 + 0.1 * np.log(16)),
    ],
)
def test_frequencies(base: RopeParameters, kind: str, expected: NDArray[np.float64] | None, temperature: float) -> None:
    scaling = RopeScaling.model_validate({"type": kind, "factor": 2})
    found = frequencies(scaled(base, scaling, original_context=4096, head_dim=DIM), DIM)
    assert found.attention_factor == pytest.approx(temperature)
    if expected is None:  # once by the whole factor is the same
        once = RopeScaling(type="yarn", factor=16)
        expected = frequencies(scaled(PLAIN, once, original_context=4096, head_dim=DIM), DIM).inverse_d.numpy()
    np.testing.assert_allclose(found.inverse_d.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("base", "kind"), [(LLAMA3, "linear"), (YARN, "linear"), (LLAMA3, "yarn"), (LINEAR, "yarn")])
def test_what_is_no_rope_of_transformers_is_refused(base: RopeParameters, kind: str) -> None:
    scaling = RopeScaling.model_validate({"type": kind, "factor": 2})
    with pytest.raises(ValueError, match=f"is '{base.rope_type}' already, which {kind} cannot .* type: ntk"):
        scaled(base, scaling, original_context=4096, head_dim=DIM)
