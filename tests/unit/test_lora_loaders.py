"""Where a file loads: the table in the code against each tool's own rules, on files that others write and on ours.

All of ours, and docs/lora-files.md: tests/parity/test_loader_table.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.loader_table import LOADERS, MODELS_LACKED, base_of, measured, rows
from tests.parity.loaders import load
from wantrain.models.lora_formats import LoraFile, LoraPair, read_lora
from wantrain.models.lora_loaders import LOADERS as TABLE
from wantrain.models.lora_loaders import loading, not_loading, told
from wantrain.models.variants import VARIANTS


def pair(stem: str, words: tuple[str, str] = ("lora_A", "lora_B"), rank: int = 4, out: int = 32
         ) -> dict[str, torch.Tensor]:
    a, b = torch.linspace(-1, 1, rank * 32).reshape(rank, 32), torch.linspace(1, 2, out * rank).reshape(out, rank)
    return {f"{stem}.{words[0]}.weight": a, f"{stem}.{words[1]}.weight": b}


UP_DOWN = ("lora_down", "lora_up")
FFN, HEAD, Q = "diffusion_model.blocks.0.ffn.0", "diffusion_model.head.head", "diffusion_model.blocks.0.self_attn.q"
FOREIGN: dict[str, tuple[dict[str, torch.Tensor], str, dict[str, str]]] = {
    "an alpha that is kept": ({**pair(FFN, out=64), f"{FFN}.alpha": torch.tensor(2.0)}, "ComfyUI", {
        "diffusers": "", "ai-toolkit": "ignores alpha", "diffusion-pipe": "raises on an alpha"}),
    "an alpha on the head": ({**pair(HEAD, out=64), **pair(FFN, out=64), f"{HEAD}.alpha": torch.tensor(4.0)},
                             "ComfyUI", {
        "diffusers": "raises: alphas outside the blocks", "ai-toolkit": "applies what is in blocks"}),
    "ranks that differ": ({**pair(FFN, rank=2, out=64), **pair(Q)}, "ComfyUI", {
        "diffusers": "", "ai-toolkit": "has one rank", "diffusion-pipe": "has one rank"}),
    "the head alone": (pair(HEAD, out=64), "ComfyUI", {
        "diffusers": "raises: nothing is in blocks", "DiffSynth-Studio": "", "VideoX-Fun": ""}),
    "half of the image part": (pair("diffusion_model.blocks.0.cross_attn.k_img"), "ComfyUI", {
        "diffusers": "raises: k_img"}),
    "diffusers' names without a prefix": (pair("blocks.0.attn2.to_q"), "", {
        "DiffSynth-Studio": "applies nothing", "LightX2V": "applies nothing", "WanVideoWrapper": "applies a part"}),
    "whole differences": (
        {**pair(FFN, UP_DOWN, out=64), f"{FFN}.diff_b": torch.ones(64), "diffusion_model.blocks.0.norm3.diff":
         torch.ones(32)}, "LightX2V", {"ComfyUI": "", "WanVideoWrapper": "", "diffusers": "leaves out",
                                       "DiffSynth-Studio": "low-rank", "diffusion-pipe": "does not know"}),
    "modulation": ({**pair(FFN, UP_DOWN, out=64), "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 32)},
                   "LightX2V", {"ComfyUI": "never applies", "WanVideoWrapper": "never applies"}),
    "kohya of one module": ({**pair("lora_unet_blocks_0_ffn_0", UP_DOWN, out=64), "lora_unet_blocks_0_ffn_0.alpha":
                             torch.tensor(2.0)}, "musubi-tuner", {"diffusers": "raises: it wants every"}),
    "fun without block 0's k": ({**pair("lora_unet__blocks_0_ffn_0", UP_DOWN, out=64),
                                 "lora_unet__blocks_0_ffn_0.alpha": torch.tensor(2.0)}, "VideoX-Fun", {
        "WanVideoWrapper": "", "ComfyUI": "applies nothing: it knows this format"}),
}
"""Files that others write: its tensors, a tool whose rules apply all of it, and what is said of some others."""


@pytest.mark.parametrize("name", FOREIGN)
def test_where_the_files_of_others_load(name: str, tmp_path: Path) -> None:
    tensors, whole, said = FOREIGN[name]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    file = read_lora(path)
    right, wrong = loading(file), dict(not_loading(file))
    for tool, why in said.items():
        assert why in wrong.get(tool, ""), tool
        assert (tool in right) == (not why), tool
    base = base_of("i2v" if "image" in name else "t2v")
    wanted = load(whole, path, base) if whole else {"blocks.0.cross_attn.q.weight": torch.ones(32, 32)}
    cells = measured(base, path, wanted)
    assert right == [tool for tool in TABLE if cells[tool] == "right"]


@pytest.mark.parametrize(("base", "kind", "targets"), [
    ("t2v", "lora", "all_linear"), ("vace", "lora", "attn"), ("i2v", "lokr", "attn"), ("t2v", "dora", "attn"),
    ("animate", "lora", "all_linear")])
def test_our_own_files_load_where_the_table_says(base: str, kind: str, targets: str) -> None:
    for row, file, cells in rows((base,), (kind,), (targets,)):
        if file:
            lacking = {tool for tool, tasks in MODELS_LACKED.items() if base in tasks}
            right = [tool for tool in TABLE if cells[tool] == "right" and tool not in lacking]
            assert loading(file, base) == right, row


def test_models_that_a_tool_lacks() -> None:
    assert set(TABLE) == set(LOADERS)
    assert {tool: loader.lacks for tool, loader in TABLE.items() if loader.lacks} == MODELS_LACKED
    pairs = {"blocks.0.self_attn.q": LoraPair(torch.ones(4, 32), torch.ones(32, 4), 4.0)}
    plain = LoraFile(Path("x"), "universal", pairs)
    for task in {variant.task for variant in VARIANTS.values()}:
        for tool in TABLE:
            why = dict(not_loading(plain, task)).get(tool)
            assert (why == "has no such model") == (task in MODELS_LACKED.get(tool, ())), (tool, task)
    named = LoraFile(Path("x"), "universal", pairs, metadata={"wantrain.variant": "wan22_animate_14b"})
    assert dict(not_loading(named))["ai-toolkit"] == "has no such model", "the file says which base it is for"


def test_what_a_user_is_told() -> None:
    pairs = {"vace_blocks.0.self_attn.q": LoraPair(torch.ones(4, 32), torch.ones(32, 4), 4.0),
             "blocks.0.self_attn.q": LoraPair(torch.ones(4, 32), torch.ones(32, 4), 4.0)}
    lines = told(LoraFile(Path("x"), "universal", pairs)).splitlines()
    assert lines[0] == "loads in  ComfyUI, WanVideoWrapper, LightX2V, VideoX-Fun"
    assert "not in    diffusers: raises: vace_blocks are left over" in lines
    assert "not in    diffusion-pipe: has no such model" in lines
