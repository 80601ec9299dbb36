"""Saved adapters: PEFT loads them as they are and computes what the training model did; so does our own reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from loray.adapters.peft_format import (
    CONFIG_FILE,
    MAX_CHARACTERS,
    MAX_PATTERNS,
    WEIGHTS_FILE,
    ModulePatterns,
    read_adapter,
)
from loray.errors import UnsupportedError
from loray.methods.attach import load_weights
from loray.spec import MLP_MODULES
from loray.train.checkpoint import save_adapter
from loray.train.model import build_model
from tests.fixtures.adapters import ADAPTERS, BaseFactory, in_peft, logits, recipe, saved, trained


@pytest.mark.filterwarnings("ignore:.*(vera_A|tie_word_embeddings).*")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize(("architecture", "tied"), [("LlamaForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_peft_computes_the_training_models_logits(
    tiny_base: BaseFactory, tmp_path: Path, architecture: str, tied: bool, adapter: dict[str, Any]
) -> None:
    base = tiny_base(architecture, tie_word_embeddings=tied, std=0.1)
    spec = recipe(adapter)
    model = saved(base, spec, tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path)), expected, atol=1e-5, rtol=1e-5)
    untrained = build_model(base, spec).eval()
    assert (logits(untrained) - expected).abs().max() > 0.1
    load_weights(untrained, read_adapter(tmp_path, base.config))
    exact = 1e-6 if spec.adapter.method == "dora" else 0  # the change of a magnitude is a difference of rounded numbers
    torch.testing.assert_close(logits(untrained), expected, atol=10 * exact, rtol=exact)
    values = dict(model.named_parameters())
    for name, parameter in untrained.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, values[name], atol=exact, rtol=exact)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_rows_where_the_head_is_not_tied(tiny_base: BaseFactory, tmp_path: Path, tied: bool) -> None:
    base = tiny_base(tie_word_embeddings=tied, std=0.1)
    spec = recipe(ADAPTERS["longlora"])
    model = saved(base, spec, tmp_path, num_rows=150)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert ("embed_tokens" in config["modules_to_save"]) == tied
    assert config["trainable_token_indices"] == (None if tied else list(range(170, 320)))
    embedding = read_adapter(tmp_path, base.config).embedding
    assert embedding is not None
    assert embedding.rows_VD.shape == ((320 if tied else 150), 64)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path)), logits(model), atol=1e-5, rtol=1e-5)
    again = build_model(base, spec).eval()
    load_weights(again, read_adapter(tmp_path, base.config))
    assert torch.equal(logits(again), logits(model))


def test_an_embedding_that_did_not_move_is_saved_dense(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(tie_word_embeddings=False), recipe(ADAPTERS["longlora"])
    save_adapter(build_model(base, spec), spec.adapter, tmp_path)
    embedding = read_adapter(tmp_path, base.config).embedding
    assert embedding is not None
    assert embedding.token_ids is None


@pytest.mark.parametrize("name", ["lora", "longlora", "vera"])
def test_bf16_is_published_bit_for_bit(tiny_base: BaseFactory, tmp_path: Path, name: str) -> None:
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    spec = recipe(ADAPTERS[name], "bfloat16")
    model = saved(base, spec, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.bfloat16}
    again = build_model(base, spec).eval()
    load_weights(again, read_adapter(tmp_path, base.config))
    assert torch.equal(logits(again), logits(model))
    in_pefts = logits(in_peft(base, model, tmp_path, torch.bfloat16))
    assert (in_pefts - logits(model)).norm() / logits(model).norm() < 0.05


def test_the_same_adapter_gives_the_same_bytes_and_no_local_path(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base()
    spec = recipe(ADAPTERS["longlora"])
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_adapter(trained(base, spec), spec.adapter, folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    assert json.loads(text)["base_model_name_or_path"] == base.name
    assert str(base.path) not in text


PATHS = [
    f"model.layers.{layer}.{'mlp' if module in MLP_MODULES else 'self_attn'}.{module}"
    for layer in (0, 1, 2, 11, 111)
    for module in ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
]
_WORDS = ("q_proj", "v_proj", "o_proj", "layers", "model", "self_attn", "mlp", "_", "proj", "1", "11")
_DOTS_AND_DIGITS = (".", r"\.", r"\d", r"\d+", ".*", "[0-2]", "(1|11)?", "1*")
_PARTS = ("(q|v)", "(?:q|v|up)_proj", "l.yers", "[a-z_]+", r"\w+?")
_PIECES = st.sampled_from([*_WORDS, *_DOTS_AND_DIGITS, *_PARTS])


def of_peft(patterns: dict[str, float], path: str) -> float | None:
    return patterns.get(get_pattern_key(patterns.keys(), path))


@given(st.lists(st.lists(_PIECES, min_size=1, max_size=6).map("".join), min_size=1, max_size=4, unique=True))
def test_values_are_pefts(written: list[str]) -> None:
    patterns = {pattern: float(i) for i, pattern in enumerate(written, 1)}
    ours = ModulePatterns("alpha_pattern", patterns, source="a")
    for path in PATHS:
        assert ours.value(path, -1) == (of_peft(patterns, path) or -1), (patterns, path)


@pytest.mark.parametrize(
    "pattern",
    [
        *("layers.1.self_attn.q_proj", "^model.layers.1.mlp.up_proj", "layers.1.1.mlp.up_proj", "layers.(0|111).*"),
        *(r"model\.layers\.(0|1|2)\.self_attn\.(q|v)_proj$", "q_proj|v_proj", ".*", "a|.*mlp.*", ""),
    ],
)
def test_forms_that_people_write(pattern: str) -> None:
    ours = ModulePatterns("rank_pattern", {pattern: 7}, source="a")
    for path in PATHS:
        assert ours.value(path, 4) == (of_peft({pattern: 7}, path) or 4), path
        assert bool(re.match(rf"(.*\.)?({pattern})$", path)) == (ours.value(path, 4) == 7)


def test_patterns_that_run_away_are_refused() -> None:
    for pattern in [
        r"(([a-z_0-9.]+)+)+!",
        r"(a+)+$",
        r"(.*)*x",
        r"(a|a)*b",
        r"(?=x)",
        r"(x)\1",
        r"a{1,9}",
        r"[^a]",
        r"(q",
        r"[",
    ]:
        with pytest.raises(UnsupportedError, match=r"adapter x: alpha_pattern: the pattern .* name the modules by"):
            ModulePatterns("alpha_pattern", {pattern: 1}, source="adapter x")


def test_work_is_bounded() -> None:
    """Python's `re` needs exponential time for the first of these."""
    for pattern in ["(.|.)" * 80 + "!", ".*" * 200 + "!", "(.|.)?" * 80 + "!"]:
        ours = ModulePatterns("alpha_pattern", {pattern: 1}, source="a")
        assert ours.value(PATHS[0], 5) == 5
    wide = ModulePatterns("alpha_pattern", {".*" * 250 + str(i): 1 for i in range(MAX_PATTERNS)}, source="a")
    with pytest.raises(UnsupportedError, match="too many steps"):
        [wide.value(path, 5) for path in PATHS * 100]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "not an object"),
        ({"q_proj": "8"}, "not a finite number"),
        ({"q_proj": True}, "not a finite number"),
        ({"q_proj": float("inf")}, "not a finite number"),
        ({"q_proj": 10**400}, "not a finite number"),
        ({"q" * (MAX_CHARACTERS + 1): 1}, "has more than"),
        ({f"{i}.*": 1 for i in range(MAX_PATTERNS + 1)}, "too many patterns"),
    ],
)
def test_what_is_no_table_of_numbers(raw: object, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModulePatterns("alpha_pattern", raw, source="a")


def test_many_paths_are_a_table() -> None:
    """As a conversion writes that gives every module a rank of its own."""
    every = {path.removeprefix("model."): i for i, path in enumerate(PATHS, 1)}
    ours = ModulePatterns("rank_pattern", every | {"q_proj": 99}, source="a")
    assert [ours.value(path, 0) for path in PATHS] == list(range(1, len(PATHS) + 1))
    assert ours.value("model.layers.7.self_attn.q_proj", 0) == 99
