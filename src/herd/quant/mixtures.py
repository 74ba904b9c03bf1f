"""llama.cpp's file types: which format each tensor of a model gets in ``Q4_K_M``, ``IQ4_XS`` and the others.

Most of a file's tensors have its main format. Values, the down projection and a few more get more bits,
because the model is more sensitive to them. Rows that do not divide into a format's blocks get a similar
format of 32 weights, as in llama.cpp.

Source: llama.cpp ``src/llama-quant.cpp`` (``llama_tensor_get_type_impl``, ``tensor_type_fallback``), for the
architecture "llama" without experts. This module does not import torch.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import QuantError
from ..llama.config import ModelConfig
from .formats import F16, F32, FORMATS, TYPES, Format, Scheme, find_format, require_fit, scheme

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
    "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
    "Q2_K_S": 21, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
"""llama.cpp's numbers of the file types that can be written."""
MIXED = 1024
"""llama.cpp's number of a file whose type must be guessed from its tensors."""
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_FALLBACK = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


@dataclass(frozen=True)
class TensorScheme(Scheme):
    """A scheme with a format for every parameter. ``linears`` is the most frequent one."""

    name: str = ""
    formats: Mapping[str, Format] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        return self.name.lower()

    def summary(self, config: ModelConfig) -> dict[str, object]:
        counts = Counter(self.formats[param].name for param, shape in config.param_shapes() if len(shape) > 1)
        return {"type": self.name, "matrices": dict(counts.most_common())}

    def plan(self, config: ModelConfig) -> dict[str, Format]:
        return dict(self.formats)


def tensor_scheme(name: str, formats: Mapping[str, Format]) -> TensorScheme:
    """Return the scheme of these formats of all parameters."""
    linears = Counter(
        format for param, format in formats.items() if param.startswith("model.layers.") and format.packed
    )
    embeddings = formats["model.embed_tokens.weight"]
    most = linears.most_common(1)[0][0] if linears else embeddings
    return TensorScheme(most, embeddings, formats.get("lm_head.weight", embeddings), name, formats)


def file_type(config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Return llama.cpp's number of the file type with these formats, or of the closest one.

    It is only shown to users. `MIXED` if no type is close.
    """
    main = formats["model.layers.0.mlp.up_proj.weight"].name
    for name, number in FILE_TYPES.items():
        for with_importance in (False, True):
            chosen = mixture(name, config, with_importance=with_importance)
            if name.startswith(main) and chosen.formats == formats:
                return number
    return FILE_TYPES.get(main, FILE_TYPES.get(f"{main}_S", MIXED))


def target_bits(to: str) -> float | None:
    """Return 4.2 for "4.2bpw" (bits per weight), or None for another text. Raises `QuantError` if it is 0."""
    found = re.fullmatch(r"(\d*\.?\d+) ?bpw", to.strip().lower())
    if found and not 0 < float(found[1]) <= 32:
        raise QuantError(f"{to}: give a number of bits per weight between 0 and 32, for example 4.2bpw")
    return float(found[1]) if found else None


def named_scheme(to: str, config: ModelConfig, *, with_importance: bool = False) -> Scheme:
    """Return the scheme of a name that a user has typed: one of `FILE_TYPES`, or a short name (q8, q4k).

    Warns if the rows of some matrices do not divide into the type's blocks, so that they get other formats.
    Raises `QuantError` for other names.
    """
    name = _ALIASES.get(to.upper(), to.upper())
    if name in FILE_TYPES:
        chosen, block = mixture(name, config, with_importance=with_importance), _main(name).block
        others = {
            param: shape[-1] for param, shape in config.param_shapes() if len(shape) > 1 and shape[-1] % block
        }
        if others:
            names = sorted({chosen.formats[param].name for param in others})
            warnings.warn(
                f"{len(others)} matrices have rows of {sorted(set(others.values()))} weights, which do not "
                f"divide into blocks of {block}: they are stored in {', '.join(names)}, as llama.cpp does",
                stacklevel=3,
            )
        return chosen
    known = [format.short for format in FORMATS.values()]
    if to.lower() not in known:
        raise QuantError(
            f"format {to!r} is not known: choose {', '.join(FILE_TYPES)}, or one format ({', '.join(known)})"
        )
    return scheme(to)


def with_parts(chosen: Scheme, config: ModelConfig, embeddings: str | None, head: str | None) -> Scheme:
    """Return the scheme with other formats of embeddings and head, where they are given."""
    formats = chosen.plan(config)
    parts = {"model.embed_tokens.weight": embeddings, "lm_head.weight": head}
    if config.tie_embeddings:
        parts = {"model.embed_tokens.weight": head or embeddings}
    for param, name in parts.items():
        if name is not None:
            formats[param] = find_format(name)
            require_fit((config.vocab_size, config.dim), formats[param], param)
    return tensor_scheme(chosen.label, formats)


def mixture(name: str, config: ModelConfig, *, with_importance: bool = False) -> TensorScheme:
    """Return llama.cpp's formats of a model's parameters for one of `FILE_TYPES`.

    Some rules differ if quantization uses the importance of columns (``with_importance``).
    """
    main = _main(name)
    formats: dict[str, Format] = {}
    for param, shape in config.param_shapes():
        if len(shape) < 2:
            formats[param] = F32
            continue
        chosen = _preferred(name, param, main, config, with_importance) if main.packed else main
        if shape[-1] % chosen.block:
            chosen = TYPES[_FALLBACK[chosen.name]] if chosen.name in _FALLBACK else F16
            chosen = F16 if shape[-1] % chosen.block else chosen
        formats[param] = chosen
    return tensor_scheme(name, formats)


def _main(name: str) -> Format:
    return TYPES[name.removesuffix("_S").removesuffix("_M").removesuffix("_L")]


def _preferred(name: str, param: str, main: Format, config: ModelConfig, with_importance: bool) -> Format:
    """Return the format of a matrix, whether or not its rows divide into blocks."""
    tied = config.tie_embeddings and param == "model.embed_tokens.weight"
    if param == "lm_head.weight" or tied:
        if config.dim % main.block:
            return TYPES["Q8_0"]
        return main if main.name == "Q8_0" else TYPES["Q6_K"]
    if not param.startswith("model.layers."):
        return main
    layer, n = int(param.split(".")[2]), config.n_layers
    leaf = param.rsplit(".", 2)[1]
    if leaf == "v_proj":
        chosen = _of_values(name, layer, n, config.n_heads // config.n_kv_heads)
        if n == 80 and config.n_heads != config.n_kv_heads and (chosen or main.name) in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"  # eight heads of the 70B share its values
    elif leaf == "down_proj":
        chosen = _of_down(name, layer, n, with_importance)
    elif leaf == "o_proj":
        chosen = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name)
    else:
        chosen = None
    return main if chosen is None else TYPES[chosen]


def _more_bits(layer: int, n: int) -> bool:
    """Return whether a layer is among the first and last eighth, or every third of the others."""
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _of_values(name: str, layer: int, n: int, heads_per_value: int) -> str | None:
    shared = heads_per_value >= 4
    match name:
        case "Q2_K":
            return "Q4_K" if shared else "Q3_K"
        case "Q2_K_S" if shared:
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if shared:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, n):
            return "Q6_K"
        case "Q4_K_S" if layer < 4:
            return "Q5_K"
    return None


def _of_down(name: str, layer: int, n: int, with_importance: bool) -> str | None:
    early = layer < n // 8
    match name:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" if early:
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if layer < n // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, n):
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS" if early and not with_importance:
            return "Q5_K"
        case "Q4_K_S" if early:
            return "Q5_K"
        # these have no lowest value, which early layers need
        case "Q4_0" | "Q5_0" if early and with_importance:
            return "Q4_1" if name == "Q4_0" else "Q5_1"
    return None
