"""PEFT's format, read and written without PEFT.

An option with which loray would compute something else than PEFT is refused by name, not ignored.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Set
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, TensorSpec, safe_open, serialize

from loray.adapters.files import MAX_CONFIG_BYTES, read_header
from loray.bases.checkpoint import in_model, plain_name
from loray.bases.config import FUSED, ModelConfig
from loray.errors import BaseMismatch, IntegrityError, UnsupportedError, shown
from loray.methods import METHODS_OF_PEFT
from loray.methods.base import StoredModule
from loray.methods.expert_lora import EXPERTS, PARAMETERS, ExpertLoraWeights, wrapped
from loray.methods.pairs import PAIR_NAMES, PairKey
from loray.methods.weights import AdapterWeights, EmbeddingRows, ModuleKey, ModuleWeights, SharedProjection
from loray.spec import LINEAR_MODULES, MLP_MODULES, InvocationTokens

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT puts it before the names of a transformers model's parameters
_METADATA = {"format": "pt"}  # of the weights' file, as PEFT writes it
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # after the embedding's path, where only changed rows are stored

MODULES = (*LINEAR_MODULES, *FUSED)  # that adapters have
_LINEAR = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>" + "|".join(MODULES) + r")\.(?P<part>.+)"
)
# Of all of a layer's experts, or, in older files, of one.
_EXPERTS = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?P<path>mlp\.experts(?:\.base_layer)*)\.(?P<part>lora_[AB])\.weight"
)
_EXPERT = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?P<path>mlp\.experts\.(?P<expert>\d+)\.(?P<module>"
    + "|".join(MLP_MODULES)
    + r"))\.(?P<part>lora_[AB])\.weight"
)
_NORM = re.compile(
    r"model\.(?P<path>norm|layers\.\d+\."
    r"(?:input_layernorm|(?:post_attention|pre_feedforward|post_feedforward)_layernorm|self_attn\.[qk]_norm))\.weight"
)
# Options that change what PEFT computes, with the values for which they change nothing.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "ensure_weight_tying": (False, None),
}
# With these initialisations PEFT changes the base's weights when it loads the adapter.
_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


_PARAMETERS = tuple(f".{name}" for name in PARAMETERS)


class AdapterFiles(NamedTuple):
    """The contents of a folder in PEFT's format. Names of tensors are PEFT's, with `PREFIX`."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config` and `tensors` to `folder`, which may exist. Names of tensors are PEFT's, with `PREFIX`.

    Equal arguments give equal bytes.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata=_METADATA)
    (folder / CONFIG_FILE).write_bytes(_config_file(config))


def files_in_memory(adapter: AdapterFiles) -> dict[str, bytes]:
    """Make the files that `write_folder` writes, of tensors on the CPU."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in adapter.tensors.items()}
    # Not safetensors.torch.save, which takes four times as long for some hundred tensors.
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    weights = bytes(serialize(specs, metadata=_METADATA))
    return {CONFIG_FILE: _config_file(adapter.config), WEIGHTS_FILE: weights}


def _config_file(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`. Raises UnsupportedError for an option that loray does not compute."""
    return _checked(folder, load_config(folder))


def load_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` of any kind of adapter."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UnsupportedError(
            f"{folder} has no {CONFIG_FILE}: it is not a PEFT adapter; name a folder of save_pretrained"
        )
    return _parsed(folder, path.read_bytes())


def parse_config(folder: Path, data: bytes) -> dict[str, Any]:
    """Parse the bytes of `adapter_config.json` as `read_config` does. Errors name `folder`."""
    return _checked(folder, _parsed(folder, data))


def _parsed(folder: Path, data: bytes) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if len(data) > MAX_CONFIG_BYTES:
        raise UnsupportedError(f"{path} has {len(data):,} bytes; at most {MAX_CONFIG_BYTES:,} are read")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise IntegrityError(f"{path} must hold an object, not {type(config).__name__}")
    return config


def _checked(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS_OF_PEFT:
        raise UnsupportedError(
            f"{folder}: peft_type {shown(kind)} is not supported; {', '.join(sorted(METHODS_OF_PEFT))} are, and "
            "`loray adapters import FOLDER --rank N` makes LoRA of others"
        )
    for option, inert in _INERT.items():
        if config.get(option) not in inert and option in config:
            raise UnsupportedError(f"{folder}: {option}={shown(config[option])} is not supported")
    METHODS_OF_PEFT[kind].check_config(config, source=str(folder / CONFIG_FILE))
    init = str(config.get("init_lora_weights", ""))
    if init.startswith(_REWRITING_INITS):
        raise UnsupportedError(
            f"{folder}: init_lora_weights={shown(init)} changes the base's weights; save it as a plain LoRA first "
            "(PEFT: path_initial_model_for_weight_conversion)"
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of `adapter_model.safetensors` by their PEFT name without `PREFIX`."""
    path = weights_path(folder)
    read_header(path)
    try:
        with safe_open(str(path), framework="pt") as f:
            return without_prefix({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise IntegrityError(f"{path} is damaged: {e}") from e


def weights_path(folder: Path) -> Path:
    """Find `adapter_model.safetensors`. Raises UnsupportedError where there is none."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        hint = " (adapter_model.bin is a pickle and is never read: convert it)" if list(folder.glob("*.bin")) else ""
        raise UnsupportedError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    return path


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Name `tensors` without `PREFIX`, also those of an adapter of a model without its head."""
    return {in_model(name.removeprefix(PREFIX)): tensor for name, tensor in tensors.items()}


def read_adapter(folder: Path, base: ModelConfig) -> AdapterWeights:
    """Read the adapter in `folder` for a base of this configuration, in the stored dtypes.

    RoPE and context length are None: the manifest has them, not PEFT's files.

    Raises UnsupportedError for what loray does not compute, BaseMismatch where shapes do not fit the base, and
    IntegrityError where the file is damaged or tensors are missing.
    """
    return parse_adapter(folder, read_config(folder), read_tensors(folder), base)


def make_pair(drawn: PairKey, stored: Mapping[str, Tensor]) -> SharedProjection:
    """Make VeRA's pair of the tensors A and B that are `stored`, else draw it."""
    from loray.methods.vera_module import draw_pair, pair_digest

    if not stored:
        return draw_pair(*drawn)
    return SharedProjection(stored["A"], stored["B"], pair_digest(stored["A"], stored["B"]))


def parse_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: ModelConfig,
    pair_of: Callable[[PairKey, Mapping[str, Tensor]], SharedProjection] = make_pair,
) -> AdapterWeights:
    """Parse an adapter as `read_adapter` does, from configuration and tensors in memory. Errors name `folder`.

    It reads only the shapes of tensors; `pair_of` reads the values of a stored VeRA pair.
    """
    norms: dict[str, Tensor] = {}
    embedding: EmbeddingRows | None = None
    parts: dict[ModuleKey, dict[str, Tensor]] = {}
    pair_tensors: dict[str, Tensor] = {}
    expert_tensors: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = plain_name(name)
        if match := _EXPERTS.fullmatch(plain) or _EXPERT.fullmatch(plain):
            expert_tensors.setdefault(int(match["layer"]), {})[f"{match['path']}.{match['part']}.weight"] = tensor
        elif match := _LINEAR.fullmatch(name):
            key = ModuleKey(int(match["layer"]), match["module"])
            if base.experts is not None and key.module in MLP_MODULES:
                raise BaseMismatch(f"{folder}: {name!r} adapts an MLP, and this base has experts in its place")
            parts.setdefault(key, {})[match["part"].removesuffix(".weight")] = tensor
        elif match := _NORM.fullmatch(name):
            norms[match["path"]] = tensor
        elif name.startswith("model.embed_tokens.") and embedding is not None:
            raise UnsupportedError(f"{folder}: the embedding is stored twice, whole and as rows")
        elif name == "model.embed_tokens.weight":
            embedding = EmbeddingRows(token_ids=None, rows_VD=tensor)
        elif name.startswith("model.embed_tokens.") and name.endswith("trainable_tokens_delta"):
            embedding = EmbeddingRows(token_ids=_token_indices(folder, config, base), rows_VD=tensor)
        elif name in PAIR_NAMES:
            pair_tensors[name[-1]] = tensor
        else:
            raise UnsupportedError(f"{folder}: tensor {name!r} belongs to nothing that loray adapts")
    if not parts and not expert_tensors and not norms and embedding is None:
        raise IntegrityError(f"{folder}: {WEIGHTS_FILE} holds no adapter tensors")
    method = METHODS_OF_PEFT[config["peft_type"]]
    ranks = ModulePatterns("rank_pattern", config.get("rank_pattern"), source=str(folder))
    alphas = ModulePatterns("alpha_pattern", config.get("alpha_pattern"), source=str(folder))

    def read(key: ModuleKey) -> ModuleWeights:
        path, label = f"model.{key.path}", f"{folder}: layer {key.layer} {key.module}"
        if key.module in FUSED and not base.has_fused_modules:
            raise BaseMismatch(f"{label}: this base has no such module; the adapter is for another base model")
        rank, alpha = ranks.value(path, config.get("r", 0)), alphas.value(path, config.get("lora_alpha", 0.0))
        return method.read(StoredModule(label, parts[key], config, rank, alpha, base.module_shape(key.module)[1]))

    modules = {key: read(key) for key in parts}
    if expert_tensors or config.get("target_parameters"):
        modules |= _read_experts(str(folder), config, expert_tensors, base, ranks, alphas)
    drawn = method.pair_key(config, base, {key.module for key in parts}, pair_tensors, str(folder))
    pair = None if drawn is None else pair_of(drawn, pair_tensors)
    invocation = _invocation(folder, config, base)
    weights = AdapterWeights(modules=modules, pair=pair, norms=norms, embedding=embedding, invocation_tokens=invocation)
    if invocation is not None and (norms or embedding is not None or weights.method != "lora"):
        raise UnsupportedError(
            f"{folder}: alora_invocation_tokens is for plain LoRA alone: what it trains beside would also change the "
            "tokens before its invocation"
        )
    check_shapes(weights, base, source=str(folder))
    return weights


def _read_experts(
    source: str,
    config: Mapping[str, Any],
    tensors: Mapping[int, Mapping[str, Tensor]],
    base: ModelConfig,
    ranks: ModulePatterns,
    alphas: ModulePatterns,
) -> dict[ModuleKey, ModuleWeights]:
    """Read LoRA of experts from their tensors by layer and by name below it."""
    targets = config.get("target_parameters") or []
    known = tuple(f"{EXPERTS}.{name}" for name in PARAMETERS)
    if base.experts is None or not all(isinstance(t, str) and f".{t}".endswith(_PARAMETERS) for t in targets):
        raise UnsupportedError(
            f"{source}: target_parameters={shown(targets)} is not supported on this base; {' and '.join(known)} are, "
            "where a base has experts"
        )
    if config.get("use_dora") or config.get("alora_invocation_tokens") or config["peft_type"] != "LORA":
        raise UnsupportedError(f"{source}: it adapts experts, which only plain LoRA does")
    modules: dict[ModuleKey, ModuleWeights] = {}
    for layer, own in tensors.items():
        path = f"model.layers.{layer}.{EXPERTS}"
        targeted = tuple(n for n in PARAMETERS if any(f".{path}.{n}".endswith(f".{t}") for t in targets))
        stored = {parameter: p for p, parameter in wrapped(targeted).items()}
        for module in MLP_MODULES:
            parameter = next(name for name, held in PARAMETERS.items() if module in held)
            each = [f"{EXPERTS}.{expert}.{module}" for expert in range(base.experts.num)]
            if f"{each[0]}.lora_A.weight" in own:
                paths, of = each, f"{path}.0.{module}"
            elif parameter in stored:
                paths, of = [stored[parameter]], f"{path}.{parameter}"
            else:
                continue
            names = [(f"{p}.lora_A.weight", f"{p}.lora_B.weight") for p in paths]
            if lacking := sorted({*chain(*names)} - {*own}):
                raise IntegrityError(f"{source}: layer {layer} lacks {lacking[0]}, with {len(lacking) - 1} others")
            rank, alpha = ranks.value(of, config.get("r", 0)), alphas.value(of, config.get("lora_alpha", 0.0))
            weights = ExpertLoraWeights(
                {name: own[name] for name in chain(*names)},
                tuple(own[a] for a, _ in names),
                tuple(own[b] for _, b in names),
                alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
                base.experts.num,
                module,
                by_turns=base.experts.by_turns,
            )
            if weights.rank != rank:
                raise IntegrityError(
                    f"{source}: layer {layer} experts' {module} has rank {weights.rank}, adapter_config.json says "
                    f"{rank:g}; save the adapter again"
                )
            modules[ModuleKey(layer, module)] = weights
    read = {(key.layer, name) for key, module in modules.items() for name in module.parts}
    if rest := sorted({(layer, name) for layer, own in tensors.items() for name in own} - read):
        raise UnsupportedError(f"{source}: layer {rest[0][0]} {rest[0][1]!r} is of none of its target_parameters")
    return modules


def _invocation(folder: Path, config: Mapping[str, Any], base: ModelConfig) -> tuple[int, ...] | None:
    """The tokens from which aLoRA is active; None for an adapter that is active from the start."""
    if (raw := config.get("alora_invocation_tokens")) is None:
        return None
    try:
        tokens: tuple[int, ...] = TypeAdapter(InvocationTokens).validate_python(raw)
    except ValidationError as e:
        raise IntegrityError(f"{folder}: alora_invocation_tokens is {shown(raw)}, not a list of tokens") from e
    if max(tokens) >= base.vocab_size:
        raise BaseMismatch(f"{folder}: alora_invocation_tokens go beyond this base's {base.vocab_size} tokens")
    return tokens


def _token_indices(folder: Path, config: Mapping[str, Any], base: ModelConfig) -> tuple[int, ...]:
    if base.tie_word_embeddings:
        raise UnsupportedError(
            f"{folder}: trainable_token_indices on a base with tied embeddings also changes the output head in PEFT; "
            "publish the embedding as modules_to_save"
        )
    raw = config.get("trainable_token_indices")
    ids = next(iter(raw.values())) if isinstance(raw, dict) and len(raw) == 1 else raw
    if not isinstance(ids, list) or any(type(i) is not int for i in ids) or len(set(ids)) != len(ids):
        raise IntegrityError(
            f"{folder}: trainable_token_indices is {shown(raw)}, not a list of different tokens, but rows are stored"
        )
    if any(not 0 <= i < base.vocab_size for i in ids):
        raise BaseMismatch(f"{folder}: trainable_token_indices go beyond this base's {base.vocab_size} tokens")
    return tuple(ids)


# -- shapes against the base ------------------------------------------------------------------------------------------


def check_shapes(weights: AdapterWeights, base: ModelConfig, *, source: str) -> None:
    """Raise BaseMismatch unless every tensor fits a base of this configuration."""
    for what, shape, expected in _shapes(weights, base):
        if shape != expected:
            raise BaseMismatch(
                f"{source}: {what} has shape {shape}, this base needs {expected}; the adapter is for another base model"
            )


def _shapes(w: AdapterWeights, base: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for key, module in w.modules.items():
        out_width, in_width = base.module_shape(key.module)
        label = f"layer {key.layer} {key.module}"
        if key.layer >= base.num_layers:
            raise BaseMismatch(
                f"{label}: this base has {base.num_layers} layers; the adapter is for another base model"
            )
        parts = module.parts
        for part, expected in module.shapes(out_width, in_width, w.pair).items():
            yield f"{label} {part.removesuffix('.weight')}", tuple(parts[part].shape), expected
    for path, norm in w.norms.items():
        if path.startswith("layers.") and int(path.split(".")[1]) >= base.num_layers:
            raise BaseMismatch(f"norm {path}: this base has {base.num_layers} layers; the adapter is for another base")
        if path.endswith(("q_norm", "k_norm")) and not base.layers[int(path.split(".")[1])].qk_norm:
            raise BaseMismatch(f"norm {path}: this base has no norm there; the adapter is for another base")
        if path.endswith("feedforward_layernorm") and base.layers[int(path.split(".")[1])].norms != "sandwich":
            raise BaseMismatch(f"norm {path}: this base has no norm there; the adapter is for another base")
        width = base.head_dim if path.endswith(("q_norm", "k_norm")) else base.hidden_size
        yield f"norm {path}", tuple(norm.shape), (width,)
    if w.embedding is not None:
        ids = w.embedding.token_ids
        rows = base.vocab_size if ids is None else len(ids)
        yield "embed_tokens", tuple(w.embedding.rows_VD.shape), (rows, base.hidden_size)


# -- patterns of modules ----------------------------------------------------------------------------------------------

MAX_LITERALS = 1 << 14
MAX_PATTERNS = 64  # that are not plain paths
MAX_CHARACTERS = 512
MAX_STEPS = 1 << 20  # of one adapter

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_PARTS = {"model", "layers", "self_attn", "mlp", *MODULES}
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": frozenset(string.digits), "w": _WORD}
_ANY = frozenset(map(chr, range(32, 127)))  # of which the paths of modules consist
_QUANTIFIERS = {"": (False, False), "*": (True, True), "+": (False, True), "?": (True, False)}  # absent, repeated


class _Atom(NamedTuple):
    characters: Set[str]
    optional: bool = False
    repeated: bool = False


class _Group(NamedTuple):
    alternatives: tuple[tuple[_Atom, ...], ...]
    optional: bool = False


class _Pattern(NamedTuple):
    """Alternatives; `from_start`: the pattern begins with ^."""

    sequences: tuple[tuple[_Atom | _Group, ...], ...]
    from_start: bool


class ModulePatterns:
    """Values of modules, by PEFT's patterns, which are regular expressions. Python's may run for ever.

    Here a pattern is of a subset, matched by following all of its positions in the path at once: characters, `.`,
    `\\d`, `\\w`, escapes, sets, each with `*`, `+` or `?`; groups of alternatives without groups in them; `^` at the
    beginning and `$` at the end. The number of steps is limited. Raises UnsupportedError, which names `source`, for
    what is not in the subset.
    """

    def __init__(self, option: str, raw: object, *, source: str) -> None:
        self._where = f"{source}: {option}"
        if raw is not None and not isinstance(raw, dict):
            raise UnsupportedError(f"{self._where} is {shown(raw)}, not an object of patterns and numbers")
        self._literals: dict[str, tuple[int, float]] = {}
        self._patterns: list[tuple[int, float, _Pattern]] = []
        self._steps_left = MAX_STEPS
        for i, (pattern, value) in enumerate((raw or {}).items()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                raise UnsupportedError(f"{self._where} of {shown(pattern)} is {shown(value)}, not a finite number")
            if len(pattern) > MAX_CHARACTERS:
                raise UnsupportedError(f"{self._where}: a pattern has more than {MAX_CHARACTERS} characters")
            if _is_path(pattern):
                self._literals.setdefault(pattern, (i, float(value)))
            else:
                self._patterns.append((i, float(value), _parse(pattern, self._where)))
        if len(self._literals) > MAX_LITERALS or len(self._patterns) > MAX_PATTERNS:
            raise UnsupportedError(
                f"{self._where} has too many patterns; {MAX_LITERALS:,} paths and {MAX_PATTERNS} others may be in it"
            )

    def value(self, path: str, default: float) -> float:
        """Find the value of the first pattern that matches `path` or a dotted suffix of it, as PEFT does."""
        if not self._literals and not self._patterns:
            return default
        starts = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
        found = [self._literals[path[s:]] for s in starts if path[s:] in self._literals]
        first = min(found, default=None)
        for i, value, pattern in self._patterns:
            if first is not None and first[0] < i:
                break
            begins = {0} if pattern.from_start else set(starts)
            if any(len(path) in self._ends(sequence, path, begins) for sequence in pattern.sequences):
                return value
        return default if first is None else first[1]

    def _ends(self, sequence: tuple[_Atom | _Group, ...], path: str, positions: set[int]) -> set[int]:
        """The positions at which a match of `sequence` that begins at one of `positions` may end."""
        for element in sequence:
            if not positions:
                return positions
            self._count(len(positions))
            if isinstance(element, _Atom):
                positions = self._step(element, path, positions)
            else:
                ends = [self._ends(alternative, path, positions) for alternative in element.alternatives]
                positions = set().union(*ends, positions if element.optional else ())
        return positions

    def _step(self, atom: _Atom, path: str, positions: set[int]) -> set[int]:
        ends = {p + 1 for p in positions if p < len(path) and path[p] in atom.characters}
        if atom.repeated:
            for p in range(min(ends, default=len(path)), len(path)):
                if p in ends and path[p] in atom.characters:
                    ends.add(p + 1)
            self._count(len(path))
        return ends | positions if atom.optional else ends

    def _count(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise UnsupportedError(f"{self._where} needs too many steps; name the modules by their paths instead")


# One token of a pattern, with its quantifier; what follows a quantifier makes it lazy, which matches the same paths.
_TOKEN = re.compile(
    r"(?P<opens>\((?:\?:)?)|(?P<bar>\|)|"
    r"(?:(?P<closes>\))|\[(?P<set>(?:\w-\w|\w|[.-](?=\])|\.)+)\]|\\(?P<escaped>[dw]|[ -/:-@\[-^`{-~])|(?P<any>\.)|"
    r"(?P<literal>[\w !\"#%&',/:;<=>@`~-]))(?P<quantifier>[*+?]?)\??",
    re.ASCII,
)


def _parse(pattern: str, where: str) -> _Pattern:
    """Raises UnsupportedError, which begins with `where`."""

    def refused(what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{where}: the pattern {shown(pattern)} is not supported ({what}); name the modules by their paths, as "
            "q_proj or layers.3.self_attn.q_proj"
        )

    from_start = pattern.startswith("^")
    at, end = int(from_start), len(pattern) - (pattern.endswith("$") and not pattern.endswith("\\$"))
    sequences: list[list[_Atom | _Group]] = [[]]
    group: list[list[_Atom]] | None = None
    while at < end:
        token = _TOKEN.match(pattern, at, end)
        if token is None or (group is not None and token["opens"]) or (group is None and token["closes"]):
            raise refused(shown(pattern[at:]))
        at = token.end()
        optional, repeated = _QUANTIFIERS[token["quantifier"] or ""]
        if token["opens"]:
            group = [[]]
        elif token["bar"]:
            (sequences if group is None else group).append([])
        elif token["closes"] and group is not None:
            if repeated:
                raise refused("a repeated group")
            sequences[-1].append(_Group(tuple(map(tuple, group)), optional))
            group = None
        else:
            (sequences if group is None else group)[-1].append(_Atom(_characters(token), optional, repeated))
    if group is not None:
        raise refused("a group without an end")
    if from_start and len(sequences) > 1:
        raise refused("^ with alternatives")
    return _Pattern(tuple(map(tuple, sequences)), from_start)


def _characters(token: re.Match[str]) -> Set[str]:
    """The characters that a token stands for."""
    if token["any"]:
        return _ANY
    if token["set"]:
        ranges = re.findall(r"(\w)-(\w)|(.)", token["set"])
        return {c for a, b, one in ranges for c in ([one] if one else map(chr, range(ord(a), ord(b) + 1)))}
    return _CLASSES.get(token["escaped"], {token["escaped"] or token["literal"]})


def _is_path(pattern: str) -> bool:
    """True where `.` can only match a dot of a module's path: then the pattern matches as text."""
    parts = pattern.split(".")
    return (
        _PLAIN.fullmatch(pattern) is not None
        and all(part in _PARTS or part.isdigit() for part in parts)
        and not any(a.isdigit() and b.isdigit() for a, b in pairwise(parts))
    )


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
