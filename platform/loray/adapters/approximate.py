"""LoRA made of adapters of PEFT's other kinds, which change weights of linear modules but are not served themselves.

What an adapter adds to a weight, D = U S Vᵀ, becomes B A with A the first rows of Vᵀ and B those columns of U S: the
best approximation of that rank (Eckart & Young, 1936). The energy of D is ‖D‖², the sum of its squared singular values;
that of those which are left out is lost.

Shapes: R rank, I input width, O output width, K the smaller of I and O.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loray.adapters.peft_format import PREFIX, load_config, weights_path, write_folder
from loray.bases.registry import BaseModel
from loray.errors import IntegrityError, UnsupportedError


class Approximation(NamedTuple):
    """How LoRA came out: its largest rank, the share of the energy of all changes that is lost, and the module that
    lost the largest share of its own.
    """

    kind: str
    rank: int
    energy_lost: float
    worst_module: str
    worst_energy_lost: float

    def __str__(self) -> str:
        return (
            f"LoRA of rank {self.rank} made of {self.kind}: {self.energy_lost:.2%} of the change's energy is lost, at "
            f"most {self.worst_energy_lost:.2%} of a module's ({self.worst_module})"
        )


def approximate(folder: Path, base: BaseModel, to: Path, *, rank: int | None, energy: float | None) -> Approximation:
    """Write a LoRA adapter that approximates the PEFT adapter in `folder` to the new folder `to`, in PEFT's format.

    rank    of every module, or of as many singular values as it has
    energy  share of each module's energy that is kept, which decides its rank; where `rank` is None

    Loads the base in fp32. Raises UnsupportedError for a kind of which PEFT does not know the changes.
    """
    config = load_config(folder)
    file, extras = weights_path(folder), set(config.get("modules_to_save") or ())  # PEFT would unpickle other files
    try:
        with safe_open(str(file), framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys() if extras.intersection(name.split("."))}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise IntegrityError(f"{file} is damaged: {e}") from e
    ranks: dict[str, int] = {}
    total = lost = worst_lost = 0.0
    worst = ""
    for path, change_OI in _changes(folder, base, config):
        if not change_OI.isfinite().all():
            raise IntegrityError(f"{folder}: the change of {path} has values that are NaN or infinite; train it again")
        u_OK, s_K, v_KI = torch.linalg.svd(change_OI, full_matrices=False)
        left_K = s_K.double().square().flip(0).cumsum(0).flip(0)  # of each value and all after it
        own = float(left_K[0])
        if rank is None:
            assert energy is not None
            ranks[path] = max(1, int((left_K > (1 - energy) * own).sum()))
        else:
            ranks[path] = min(rank, len(s_K))
        own_lost = float(left_K[ranks[path]]) if ranks[path] < len(s_K) else 0.0
        total, lost = total + own, lost + own_lost
        share = own_lost / own if own else 0.0
        if not worst or share > worst_lost:
            worst, worst_lost = path, share
        kept = slice(ranks[path])
        tensors[f"{PREFIX}model.{path}.lora_A.weight"] = v_KI[kept]
        tensors[f"{PREFIX}model.{path}.lora_B.weight"] = u_OK[:, kept] * s_K[kept]
    most = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != most}
    write_folder(
        to,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.name,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted({path.rpartition(".")[2] for path in ranks}),
            "modules_to_save": sorted(extras) or None,
            "inference_mode": True,
        },
        tensors,
    )
    return Approximation(str(config["peft_type"]), most, lost / total if total else 0.0, worst, worst_lost)


@torch.no_grad()
def _changes(folder: Path, base: BaseModel, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Path below `model.` and change of each adapted weight, in fp32."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    kind = config.get("peft_type")
    tuner = next((tuner for known, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if known.value == kind), None)
    if not hasattr(tuner, "tuner_layer_cls"):
        raise UnsupportedError(f"{folder}: {kind} adapters are not served, and no LoRA can be made of them")
    if (bias := config.get("bias")) not in (None, "none"):
        raise UnsupportedError(f"{folder}: bias={bias!r} is not supported, and no part of LoRA")
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT would do for training
        try:
            model: Any = PeftModel.from_pretrained(plain, folder)
        except (ValueError, TypeError, KeyError, RuntimeError) as e:
            raise IntegrityError(f"{folder}: PEFT cannot load it on {base.name}: {e}") from e
    adapted = [(path, m) for path, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)]
    other = [path for path, m in adapted if not m.supports_lora_conversion() or not path.startswith("model.layers.")]
    if other or not adapted:
        where = f" of {other[0]}" if other else ""
        raise UnsupportedError(f"{folder}: {kind} adapters are not served, and no LoRA can be made{where}")
    for path, module in adapted:
        weight_OI = module.get_base_layer().weight
        before_OI = weight_OI.clone()
        module.merge()
        yield path.removeprefix("model."), module.get_base_layer().weight - before_OI
        module.get_base_layer().weight.data = before_OI
