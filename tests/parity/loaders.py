"""What each tool does with a LoRA file, in our words; diffusers and peft are called (SOURCES says what was read).

Every function takes the tensors of a file and the Linears of a base (official module paths) and gives the change of
each official tensor that the tool makes; `Refused` where the tool raises. Nothing here uses wantrain's own reader.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]

UP_DOWN = ("lora_up.weight", "lora_down.weight")
B_A = ("lora_B.weight", "lora_A.weight")
DEFAULT = ("lora_B.default.weight", "lora_A.default.weight")
BARE = ("lora_B", "lora_A")
DOTTED = ("lora.up.weight", "lora.down.weight")


class Refused(Exception):
    """The tool raises on this file."""


class Base(NamedTuple):
    """A tiny transformer, its Linears (official path -> diffusers path), and its other tensors (official names)."""

    module: torch.nn.Module
    linears: dict[str, str]
    others: frozenset[str]


class Source(NamedTuple):
    """What was read of a tool: repository or package, commit or version, files; the day is that of the reading."""

    where: str
    version: str
    files: str


def _scale(tensors: Tensors, stem: str, rank: int) -> float:
    return float(tensors[f"{stem}.alpha"]) / rank if f"{stem}.alpha" in tensors else 1.0


def pair_delta(tensors: Tensors, stem: str, spellings: tuple[tuple[str, str], ...]) -> torch.Tensor | None:
    """alpha/rank * B A of a stem in the first spelling that the file has; scale 1 without an alpha."""
    for up, down in spellings:
        if f"{stem}.{up}" in tensors:
            b, a = tensors[f"{stem}.{up}"].float(), tensors[f"{stem}.{down}"].float()
            return _scale(tensors, stem, a.shape[0]) * b.flatten(1) @ a.flatten(1)
    return None


def product_delta(tensors: Tensors, stem: str) -> torch.Tensor | None:
    """LoHa and LoKr as ComfyUI, musubi and LyCORIS compute them: a LoKr's alpha counts for a narrow factor only."""
    def factor(name: str) -> torch.Tensor:
        if f"{stem}.{name}" in tensors:
            return tensors[f"{stem}.{name}"].float()
        return tensors[f"{stem}.{name}_a"].float() @ tensors[f"{stem}.{name}_b"].float()

    if f"{stem}.hada_w1_a" in tensors:
        rank = tensors[f"{stem}.hada_w1_b"].shape[0]
        return _scale(tensors, stem, rank) * factor("hada_w1") * factor("hada_w2")
    if any(name.startswith(f"{stem}.lokr_w") for name in tensors):
        narrow = [tensors[f"{stem}.{w}_b"].shape[0] for w in ("lokr_w1", "lokr_w2") if f"{stem}.{w}_b" in tensors]
        scale = _scale(tensors, stem, narrow[-1]) if narrow else 1.0
        return scale * torch.kron(factor("lokr_w1").contiguous(), factor("lokr_w2").contiguous())
    return None


def flat(name: str) -> str:
    return name.replace(".", "_")


def comfyui(tensors: Tensors, base: Base) -> Tensors:
    """By the model's own tensors: a weight is found under its path, with dots or flat; others under their full name.

    What no tensor of the model asks for is logged and left. Changes of modulation are taken and never applied.
    """
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in tensors:
        tensors = {name.replace("lora_unet__", "lora_unet_"): tensor for name, tensor in tensors.items()}
    found: Tensors = {}
    weights = [*base.linears, *(name.removesuffix(".weight") for name in base.others if name.endswith(".weight"))]
    for module in weights:
        for stem in (f"lora_unet_{flat(module)}", f"diffusion_model.{module}"):
            for delta in (pair_delta(tensors, stem, (UP_DOWN, B_A, DOTTED, BARE, DEFAULT)),
                          product_delta(tensors, stem), tensors.get(f"{stem}.diff")):
                if delta is not None:
                    found[f"{module}.weight"] = delta
            if f"{stem}.diff_b" in tensors:
                found[f"{module}.bias"] = tensors[f"{stem}.diff_b"]
    return found


def _from_fun(name: str) -> str:
    """The wrapper's rewriting of the double underscore: dots come back in the words it knows."""
    stem, _, leaf = name.removeprefix("lora_unet__").partition(".")
    leaf = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(leaf, leaf)
    if "blocks_" in stem:
        words = re.fullmatch(r"blocks_(\d+)_(self_attn|cross_attn|ffn)_([a-z0-9]+?)(_img)?", stem)
        return f"diffusion_model.blocks.{words[1]}.{words[2]}.{words[3]}{words[4] or ''}.{leaf}" if words else name
    for words_, path in (("text_embedding", "text_embedding"), ("time_embedding", "time_embedding"),
                         ("time_projection", "time_projection"), ("img_emb", "img_emb"), ("head", "head")):
        if stem.startswith(words_):
            return f"diffusion_model.{path}{flat(stem.removeprefix(words_)).replace('_', '.')}.{leaf}"
    return name


def _standardised(name: str) -> str:
    """The wrapper's rewriting of one name, in its order."""
    if name.startswith("lycoris_blocks_"):
        for old, new in (("lycoris_blocks_", "blocks."), ("_cross_attn_", ".cross_attn."),
                         ("_self_attn_", ".self_attn."), ("_ffn_net_0_proj", ".ffn.0"), ("_ffn_net_2", ".ffn.2"),
                         ("to_out_0", "o")):
            name = name.replace(old, new)
    for prefix, new in (("transformer.", "diffusion_model."), ("pipe.dit.", "diffusion_model."),
                        ("blocks.", "diffusion_model.blocks."), ("vace_blocks.", "diffusion_model.vace_blocks.")):
        if name.startswith(prefix):
            name = name.replace(prefix, new)
    name = name.replace(".default.", ".").replace(".diff_m", ".modulation.diff")
    name = name.replace("base_model.model.", "diffusion_model.")
    if name.startswith("lora_unet__"):
        name = _from_fun(name)
    if ".attn1." in name or ".attn2." in name:
        for old, new in ((".attn1.", ".cross_attn."), (".attn2.", ".cross_attn."), (".to_k.", ".k."), (".to_q.", ".q."),
                         (".to_v.", ".v."), (".to_out.0.", ".o.")):
            name = name.replace(old, new)
    return name


def wan_video_wrapper(tensors: Tensors, base: Base) -> Tensors:
    """Rewrites names, then ComfyUI's way. A file of PEFT with official names is taken for rank-stabilised."""
    tensors = dict(tensors)
    first = tensors.get("base_model.model.blocks.0.cross_attn.k.lora_A.weight")
    if first is not None:
        rank = first.shape[0]
        tensors |= {name.replace(".lora_A.weight", ".alpha"): torch.tensor(rank * rank // rank**0.5)
                    for name in list(tensors) if name.endswith(".lora_A.weight")}
    return comfyui({_standardised(name): tensor for name, tensor in tensors.items()}, base)


def diffsynth(tensors: Tensors, base: Base) -> Tensors:
    """Every B's path without its leaf, an adapter's name and a leading `diffusion_model`, if the dit has that module.

    VACE's blocks are another model there (pipe.vace).
    """
    found: Tensors = {}
    for name in tensors:
        is_up = ".lora_up." in name
        up, down = ("lora_up", "lora_down") if is_up else ("lora_B", "lora_A")
        if up not in name.split("."):
            if up in name:
                raise Refused
            continue
        stem = name[:name.index(f".{up}")]
        module = stem.removeprefix("diffusion_model.")
        if module not in base.linears or module.startswith("vace_"):
            continue
        a, b = tensors[name.replace(up, down)], tensors[name]
        if a.ndim == 5:
            raise Refused
        found[f"{module}.weight"] = _scale(tensors, stem, a.shape[0]) * b.float() @ a.float()
    return found


def lightx2v(tensors: Tensors, base: Base) -> Tensors:
    """Every B with its A, the path without one known prefix; and .diff, .diff_b, .diff_m. Linears only."""
    found: Tensors = {}
    modules = set(base.linears)

    def bare(stem: str) -> str:
        return next((stem.removeprefix(p) for p in ("diffusion_model.", "model.", "unet.") if stem.startswith(p)), stem)

    for name, tensor in tensors.items():
        for up, down in (UP_DOWN, B_A, DOTTED, BARE, DEFAULT):
            if name.endswith(f".{up}"):
                stem = name.removesuffix(f".{up}")
                if bare(stem) in modules and tensors[f"{stem}.{down}"].ndim == 2:
                    found[f"{bare(stem)}.weight"] = pair_delta(tensors, stem, ((up, down),))
                break
        for suffix, leaf in ((".diff", "weight"), (".diff_b", "bias"), (".diff_m", "modulation")):
            target = f"{bare(name.removesuffix(suffix))}.{leaf}"
            own = base.others | {f"{module}.{x}" for module in modules for x in ("weight", "bias")}
            if name.endswith(suffix) and target in own:
                found[target] = tensor
    return found


def videox_fun(tensors: Tensors, base: Base) -> Tensors:
    """All of a name is flattened but its leaf, and walked back into the model; a leaf it does not know raises."""
    paths = {flat(module): module for module in base.linears}
    layers: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        key = flat(name.replace("diffusion_model.", ""))
        for end, leaf in (("_lora_up_weight", UP_DOWN[0]), ("_lora_down_weight", UP_DOWN[1]), ("_alpha", "alpha"),
                          ("_lora_A_default_weight", UP_DOWN[1]), ("_lora_B_default_weight", UP_DOWN[0]),
                          ("_lora_A_weight", UP_DOWN[1]), ("_lora_B_weight", UP_DOWN[0])):
            if key.endswith(end):
                stem = re.sub(r"^lora_unet_+", "", key.removesuffix(end))
                layers.setdefault(stem, {})[f"x.{leaf}"] = tensor
                break
        else:
            raise Refused
    found = {f"{paths[stem]}.weight": pair_delta(leaves, "x", (UP_DOWN,))
             for stem, leaves in layers.items() if stem in paths}
    return {name: delta for name, delta in found.items() if delta is not None}


def ai_toolkit(tensors: Tensors, base: Base) -> Tensors:
    """Official names become diffusers'; only Linears in blocks have a LoRA; alpha is passed over; one rank for all."""
    words = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
             "k_img": "add_k_proj", "v_img": "add_v_proj"}
    converted: Tensors = {}
    for name, tensor in tensors.items():
        key = re.sub(r"^diffusion_model\.", "transformer.", name)
        key = ".".join(words.get(word, word) for word in key.split("."))
        if "ffn.net" not in key:
            key = key.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
        converted[key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")] = tensor
    ranks = [tensor.shape[0] for name, tensor in converted.items() if name.endswith(".lora_A.weight")]
    found: Tensors = {}
    for module, twin in base.linears.items():
        a, b = (converted.get(f"transformer.{twin}.lora_{x}.weight") for x in "AB")
        if module.startswith("blocks.") and a is not None and b is not None:
            found[f"{module}.weight"] = b[:, :ranks[0]].float() @ a[:ranks[0]].float()
    return found


def diffusion_pipe(tensors: Tensors, base: Base) -> Tensors:
    """Each name must be that of a parameter of its own adapter: Linears in blocks, one rank, no alpha; else raises."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    pairs: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        bare = re.sub(r"^(transformer|diffusion_model)\.", "", name)
        key = re.fullmatch(r"(blocks\.\d+\..+)\.lora_([AB])\.weight", bare)
        if key is None or key[1] not in base.linears or len(ranks) > 1:
            raise Refused
        pairs.setdefault(key[1], {})[key[2]] = tensor.float()
    return {f"{module}.weight": pair["B"] @ pair["A"] for module, pair in pairs.items()}


def musubi(tensors: Tensors, base: Base) -> Tensors:
    """Asks for `lora_unet_` and the flat official path of each weight; alpha is the rank where it lacks."""
    found = {f"{module}.weight": delta for module in base.linears for stem in (f"lora_unet_{flat(module)}",)
             for delta in (pair_delta(tensors, stem, (UP_DOWN,)), product_delta(tensors, stem)) if delta is not None}
    if any(tensor.ndim == 5 for name, tensor in tensors.items() if name.startswith("lora_unet_patch")):
        raise Refused
    return found


def lycoris(tensors: Tensors, base: Base) -> Tensors:
    """Asks for `lycoris_` and the flat diffusers path of each Linear."""
    return {f"{module}.weight": delta for module, twin in base.linears.items()
            for stem in (f"lycoris_{flat(twin)}",)
            for delta in (pair_delta(tensors, stem, (UP_DOWN,)), product_delta(tensors, stem)) if delta is not None}


def changed(module: torch.nn.Module, base: Base) -> Tensors:
    """What the adapters in a module make of its weights and biases, by official name."""
    official = {twin: name for name, twin in base.linears.items()}
    found: Tensors = {}
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            twin = name.removeprefix("base_model.model.")
            for leaf, tensor in layer.get_base_layer().named_parameters():
                delta = tensor.detach() - base.module.get_submodule(twin).get_parameter(leaf)
                if delta.any():
                    found[f"{official[twin]}.{leaf}"] = delta
    return found


def by_diffusers(path: Path, base: Base) -> Tensors:
    """diffusers itself."""
    module = copy.deepcopy(base.module)
    try:
        state, metadata = WanPipeline.lora_state_dict(str(path), return_lora_metadata=True)
        WanPipeline.load_lora_into_transformer(state, module, metadata=metadata)
    except (ValueError, KeyError, IndexError, RuntimeError, UnboundLocalError, OSError) as error:
        raise Refused from error
    return changed(module, base)


def by_peft(path: Path, base: Base) -> Tensors:
    """peft itself."""
    try:
        return changed(PeftModel.from_pretrained(copy.deepcopy(base.module), str(path)), base)
    except (ValueError, OSError) as error:
        raise Refused from error


Rules = Callable[[Tensors, Base], Tensors]
RULES: dict[str, Rules] = {
    "ComfyUI": comfyui, "WanVideoWrapper": wan_video_wrapper, "DiffSynth-Studio": diffsynth, "LightX2V": lightx2v,
    "VideoX-Fun": videox_fun, "ai-toolkit": ai_toolkit, "diffusion-pipe": diffusion_pipe, "musubi-tuner": musubi,
    "LyCORIS": lycoris,
}
CALLED: dict[str, Callable[[Path, Base], Tensors]] = {"diffusers": by_diffusers, "PEFT": by_peft}

SOURCES: dict[str, Source] = {
    "ComfyUI": Source("comfyanonymous/ComfyUI", "02b5222, 0323d87, 179c2d3", "comfy/lora_convert.py, "
                      "weight_adapter/lora.py, weight_adapter/lokr.py"),
    "WanVideoWrapper": Source("kijai/ComfyUI-WanVideoWrapper", "3317577", "nodes_model_loading.py"),
    "diffusers": Source("diffusers", "called", ""),
    "PEFT": Source("peft", "called", ""),
    "DiffSynth-Studio": Source("modelscope/DiffSynth-Studio", "237d178", "diffsynth/utils/lora/general.py"),
    "LightX2V": Source("ModelTC/LightX2V", "0d6b494, 217947d", "lightx2v/utils/lora_loader.py, "
                       "lightx2v/models/networks/lora_adapter.py"),
    "VideoX-Fun": Source("aigc-apps/VideoX-Fun", "063db15", "videox_fun/utils/lora_utils.py"),
    "ai-toolkit": Source("ostris/ai-toolkit", "0ef3aa2, a836515", "toolkit/network_mixins.py, "
                         "toolkit/models/wan21/wan_lora_convert.py"),
    "diffusion-pipe": Source("tdrussell/diffusion-pipe", "0467b63, 41fa128", "models/base.py, models/wan/wan.py"),
    "musubi-tuner": Source("kohya-ss/musubi-tuner", "0bcd20e, 1980694, 51be3dc", "src/musubi_tuner/utils/"
                           "lora_utils.py, networks/loha.py, wan/configs/__init__.py"),
    "LyCORIS": Source("KohakuBlueleaf/LyCORIS", "4.1.3", "run earlier, not read"),
}
MODELS_LACKED: dict[str, tuple[str, ...]] = {
    "diffusers": ("control_reference", "control_inpaint", "camera", "camera_inpaint", "s2v"),
    "ai-toolkit": ("vace", "animate", "animate2", "control", "control_reference", "control_inpaint", "camera",
                   "camera_inpaint", "s2v", "flf2v"),
    "diffusion-pipe": ("vace", "animate", "animate2", "control", "control_reference", "control_inpaint", "camera",
                       "camera_inpaint", "s2v"),
    "musubi-tuner": ("vace", "animate", "animate2", "control_reference", "control_inpaint", "camera", "camera_inpaint",
                     "s2v", "ti2v"),
}
"""Tasks of which a tool has no model: read for diffusers, diffusion-pipe and musubi-tuner, not for ai-toolkit."""


def load(loader: str, path: Path, base: Base) -> Tensors:
    """What a tool makes of the tensors of `base` with a file, or a PEFT folder. Raises Refused."""
    if loader in CALLED:
        return CALLED[loader](path, base)
    tensors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    return RULES[loader](tensors, base)


def verdict(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """`right`, `nothing`, `N of M` where the rest is right, or `wrong`."""
    if not found:
        return "nothing"
    if not found.keys() <= wanted.keys():
        return "wrong"
    for name, delta in found.items():
        if (delta.reshape(-1) - wanted[name].reshape(-1)).norm() > 1e-4 * wanted[name].norm():
            return "wrong"
    return "right" if len(found) == len(wanted) else f"{len(found)} of {len(wanted)}"
