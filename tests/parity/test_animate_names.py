"""Wan-Animate under its official names: the map against the public file's digest, and a file of them that loads."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel

from tests.tiny_models import Tensors, bare_file
from tests.tiny_tasks import random
from wantrain import cli
from wantrain.models import names
from wantrain.models.base import Base
from wantrain.models.lora_formats import LoraPair
from wantrain.models.lora_writing import write_lora
from wantrain.models.variants import VARIANTS, diffusers_config

PUBLIC_MD5 = "31fa352acb8a1b1d33cd8764273d80a2"
"""DiffSynth-Studio's of the public file (docs/facts.md, "Variants")."""


def md5(shapes: dict[str, tuple[int, ...]]) -> str:
    """As in test_official_names.py."""
    entries = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*entries, *shapes])).encode()).hexdigest()


FACE = {"to_k": "linear1_kv", "to_q": "linear1_q", "to_out": "linear2", "norm_q": "q_norm", "norm_k": "k_norm"}


def official(state: Tensors, num_blocks: int) -> Tensors:
    """The state dict of diffusers' class as the official code has it; `num_blocks` of the motion encoder."""
    found: Tensors = {}
    convs = "motion_encoder.enc.net_app.convs"
    places = {"conv1.weight": "conv1.0.weight", "conv1.act_fn.bias": "conv1.1.bias", "conv2.weight": "conv2.1.weight",
              "conv2.act_fn.bias": "conv2.2.bias", "conv_skip.weight": "skip.1.weight"}
    whole = {"motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
             "motion_encoder.conv_in.weight": f"{convs}.0.0.weight",
             "motion_encoder.conv_in.act_fn.bias": f"{convs}.0.1.bias",
             "motion_encoder.conv_out.weight": f"{convs}.{num_blocks + 1}.weight"}
    for name, tensor in state.items():
        if block := re.fullmatch(r"motion_encoder\.res_blocks\.(\d+)\.(.+)", name):
            found[f"{convs}.{int(block[1]) + 1}.{places[block[2]]}"] = tensor
        elif face := re.fullmatch(r"face_adapter\.(\d+)\.(\w+)\.(\w+)", name):
            parts = [tensor, *([state[name.replace("to_k", "to_v")]] if face[2] == "to_k" else [])]
            if face[2] != "to_v":
                found[f"face_adapter.fuser_blocks.{face[1]}.{FACE[face[2]]}.{face[3]}"] = torch.cat(parts)
        elif name in whole or name.startswith(names.ANIMATE_ONLY):
            own = re.sub(r"(face_encoder\.conv\w+)\.", r"\1.conv.", name)
            found[whole.get(name) or own.replace("motion_network", "enc.fc")] = tensor
        else:
            found[names.transformer_to_official(name)] = tensor
    for name in [name for name in found if name.startswith(convs) and name.endswith("bias")]:
        found[name] = found[name].view(1, -1, 1, 1)
    kernels = [f"{convs}.{i + 1}.{part}.0.kernel" for i in range(num_blocks) for part in ("conv2", "skip")]
    return found | {name: torch.ones(4, 4) for name in kernels}


def test_the_official_inventory_is_that_of_the_public_file() -> None:
    variant = VARIANTS["wan22_animate_14b"]
    with torch.device("meta"):
        state = WanAnimateTransformer3DModel(**diffusers_config(variant)).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in official(state, 7).items()}
    assert md5(shapes) == PUBLIC_MD5
    assert (len(shapes), round(sum(map(math.prod, shapes.values())) / 1e9, 3)) == (1441, 17.275)
    rename = names.transformer_rename(shapes)
    assert sorted(twin for name in shapes for twin in rename(name)) == sorted(state)


def test_a_file_of_official_names_loads(tmp_path: Path) -> None:
    variant = VARIANTS["tiny_wan_animate"]
    module = random(WanAnimateTransformer3DModel(**diffusers_config(variant)), 3)
    path = bare_file(tmp_path, official(module.state_dict(), 2))
    own = Base(variant, {"transformer": path})
    assert "tiny_wan_animate: from the tensors" in own.detected()
    loaded = own.transformer(torch.float32, torch.device("cpu")).state_dict()
    assert loaded.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_merging_keeps_the_names_that_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = random(WanAnimateTransformer3DModel(**diffusers_config(VARIANTS["tiny_wan_animate"])), 3)
    path, lora = bare_file(tmp_path / "base", official(module.state_dict(), 2)), tmp_path / "lora.safetensors"
    pairs = {"blocks.0.self_attn.q": LoraPair(torch.randn(2, 96), torch.randn(96, 2), 2.0)}
    write_lora(lora, pairs, "universal", {}, dtype=torch.float32)
    module.save_pretrained(tmp_path / "folder")
    for base, layout in ((path, "official"), (tmp_path / "folder", "diffusers")):
        out = tmp_path / layout if layout == "diffusers" else tmp_path / "out.safetensors"
        other = "diffusers" if layout == "official" else "official"
        nowhere = tmp_path / ("none" if other == "diffusers" else "none.safetensors")
        assert cli.main(["merge", str(base), str(lora), str(nowhere), f"layout={other}"]) == 2
        assert "cut otherwise" in capsys.readouterr().err
        assert cli.main(["merge", str(base), str(lora), str(out), f"layout={layout}", "dtype=float32"]) == 0
        found = Base(VARIANTS["tiny_wan_animate"], {"transformer": out}).transformer(torch.float32, torch.device("cpu"))
        assert {name for name, tensor in found.state_dict().items() if not torch.equal(
            tensor, module.state_dict()[name])} == {"blocks.0.attn1.to_q.weight"}
