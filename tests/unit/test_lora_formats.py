"""LoRA files: every format keeps the deltas, other libraries agree, and damaged files are refused by name."""

from __future__ import annotations

import json
import math
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests import tiny_models as tiny
from wantrain.lora import MAGNITUDE
from wantrain.models import names
from wantrain.models.containers import ContainerError
from wantrain.models.lora_formats import GRAMMARS, LoraFile, LoraPair, check_fit, read_lora
from wantrain.models.lora_names import PEFT_CONFIG, PEFT_WEIGHTS
from wantrain.models.lora_updates import worst_difference
from wantrain.models.lora_writing import write_lora
from wantrain.terms import UserError

MODULES = [f"blocks.{n}.{m}" for n in (0, 1) for m in (
    *(f"{attn}.{x}" for attn in ("self_attn", "cross_attn") for x in "qkvo"), "ffn.0", "ffn.2")]
SIZES = {"ffn.0": (64, 32), "ffn.2": (32, 64)}


def pair(module: str, rank: int, alpha: float) -> LoraPair:
    out, into = SIZES.get(module.split(".", 2)[2], (32, 32))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{module} {rank}".encode()))
    return LoraPair(torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator), alpha)


def some_pairs(rank: int = 6, alpha: float = 4.5, modules: list[str] | None = None) -> dict[str, LoraPair]:
    return {module: pair(module, rank, alpha) for module in modules or MODULES}


def written(folder: Path, format: str, pairs: dict[str, LoraPair] | None = None, **more: object) -> Path:
    path = folder / ("adapter" if format == "peft" else "lora.safetensors")
    write_lora(path, some_pairs() if pairs is None else pairs, format, {"ss_output_name": "x"}, **more)
    return path


def differ(pairs: dict[str, LoraPair], others: dict[str, LoraPair]) -> tuple[float, str]:
    return worst_difference(LoraFile(Path("a"), "universal", pairs), LoraFile(Path("b"), "universal", others))


# One module's keys in each format, from what each writer writes (docs/facts.md, "LoRA formats"), not from the table.
KEYS = {
    "universal": ["diffusion_model.blocks.0.ffn.0.lora_A.weight", "diffusion_model.blocks.0.ffn.0.lora_B.weight"],
    "comfy_updown": ["diffusion_model.blocks.0.ffn.0.lora_down.weight",
                     "diffusion_model.blocks.0.ffn.0.lora_up.weight"],
    "kohya": ["lora_unet_blocks_0_ffn_0.alpha", "lora_unet_blocks_0_ffn_0.lora_down.weight",
              "lora_unet_blocks_0_ffn_0.lora_up.weight"],
    "fun": ["lora_unet__blocks_0_ffn_0.alpha", "lora_unet__blocks_0_ffn_0.lora_down.weight",
            "lora_unet__blocks_0_ffn_0.lora_up.weight"],
    "diffusers": ["transformer.blocks.0.ffn.net.0.proj.lora_A.weight",
                  "transformer.blocks.0.ffn.net.0.proj.lora_B.weight"],
    "peft": ["base_model.model.blocks.0.ffn.net.0.proj.lora_A.weight",
             "base_model.model.blocks.0.ffn.net.0.proj.lora_B.weight"],
    "lycoris": ["lycoris_blocks_0_ffn_net_0_proj.alpha", "lycoris_blocks_0_ffn_net_0_proj.lora_down.weight",
                "lycoris_blocks_0_ffn_net_0_proj.lora_up.weight"],
    "diffsynth": ["blocks.0.ffn.0.lora_A.default.weight", "blocks.0.ffn.0.lora_B.default.weight"],
    "diffsynth_pipe": ["pipe.dit.blocks.0.ffn.0.lora_A.default.weight",
                       "pipe.dit.blocks.0.ffn.0.lora_B.default.weight"],
}


@pytest.mark.parametrize("format", GRAMMARS)
def test_keys_are_the_formats_own(format: str, tmp_path: Path) -> None:
    path = written(tmp_path, format, some_pairs(modules=["blocks.0.ffn.0"]))
    tensors = load_file(path / PEFT_WEIGHTS if format == "peft" else path)
    assert sorted(tensors) == KEYS[format]
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            assert tensor.item() == 4.5


ranks_and_alphas = st.lists(st.tuples(st.sampled_from(MODULES), st.integers(1, 16), st.floats(2**-7, 64.0, width=32)),
                            min_size=1, max_size=6, unique_by=lambda row: row[0])


@pytest.mark.parametrize("format", GRAMMARS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ranks_and_alphas)
def test_writing_and_reading_keeps_every_delta(format: str, rows: list[tuple[str, int, float]], tmp_path: Path) -> None:
    pairs = {module: pair(module, rank, alpha) for module, rank, alpha in rows}
    lora = read_lora(written(tmp_path, format, pairs))
    assert lora.format == format
    assert lora.metadata["ss_output_name"] == "x"
    assert lora.metadata["format"] == "pt"
    worst, where = differ(pairs, lora.pairs)
    assert worst < 1e-6, where
    largest = max(pair.rank for pair in pairs.values())
    for module, read in lora.pairs.items():
        rank = pairs[module].rank
        assert read.rank == largest, "one rank, by zeros"
        assert torch.equal(read.a[:rank], pairs[module].a)
        assert not read.a[rank:].any()
        assert not read.b[:, rank:].any()
        wanted = pairs[module].delta()
        assert (read.delta() - wanted).norm() <= 1e-6 * wanted.norm()
        if GRAMMARS[format].folds:
            assert read.alpha == largest
        else:
            assert read.scale == pytest.approx(pairs[module].scale)
            assert torch.equal(read.b[:, :rank], pairs[module].b)


@pytest.mark.parametrize("first", GRAMMARS)
def test_there_and_back_is_the_identity(first: str, tmp_path: Path) -> None:
    """A -> B -> A for every B: the same names, and the same tensors where alpha stays outside or was folded."""
    start = read_lora(written(tmp_path / "start", first, some_pairs(modules=MODULES[::5])))
    for second in GRAMMARS:
        there = read_lora(written(tmp_path / second, second, start.pairs))
        back = read_lora(written(tmp_path / second / "back", first, there.pairs))
        assert back.format == first
        assert differ(start.pairs, back.pairs)[0] < 1e-6
        if GRAMMARS[first].folds or not GRAMMARS[second].folds:
            for module, read in start.pairs.items():
                assert torch.equal(back.pairs[module].b, read.b)
                assert back.pairs[module].alpha == read.alpha


def test_worst_difference_measures() -> None:
    pairs = some_pairs()
    other = dict(pairs)
    other["blocks.1.ffn.2"] = LoraPair(pairs["blocks.1.ffn.2"].a, pairs["blocks.1.ffn.2"].b, 4.5 * 1.001)
    worst, where = differ(pairs, other)
    assert where == "blocks.1.ffn.2"
    assert worst == pytest.approx(1e-3, rel=1e-3)
    assert differ(pairs, dict(pairs))[0] < 1e-7
    del other["blocks.0.ffn.0"]
    assert differ(pairs, other) == (math.inf, "blocks.0.ffn.0")
    scaled = {m: LoraPair(p.a, p.b * 2, p.alpha / 2) for m, p in pairs.items()}
    assert differ(pairs, scaled)[0] < 1e-7


# Other libraries.

def merged_deltas(module: torch.nn.Module, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {names.transformer_to_official(name): tensor - base.state_dict()[name]
            for name, tensor in module.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}


def assert_deltas(found: dict[str, torch.Tensor], pairs: dict[str, LoraPair]) -> None:
    assert set(found) == {f"{module}.weight" for module in pairs}
    for module, one in pairs.items():
        wanted = one.delta()
        assert (found[f"{module}.weight"] - wanted).norm() <= 1e-5 * wanted.norm(), module


def fresh() -> torch.nn.Module:
    module = tiny.WanTransformer3DModel(**tiny.SIZES)
    module.load_state_dict(tiny.transformer("t2v").state_dict())
    return module


MIXED = {**some_pairs(modules=[m for m in MODULES if not m.endswith("k")]),
         **{m: pair(m, 3, 7.0) for m in MODULES if m.endswith("k")}}


@pytest.mark.parametrize("format", ["universal", "diffusers", "kohya"])
def test_diffusers_loads_it_with_the_same_effect(format: str, tmp_path: Path) -> None:
    path = written(tmp_path, format, MIXED)
    module = fresh()
    state, metadata = WanPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    WanPipeline.load_lora_into_transformer(state, module, metadata=metadata)
    module.fuse_lora()
    module.unload_lora()
    assert_deltas(merged_deltas(module, tiny.transformer("t2v")), MIXED)


def test_peft_loads_it_with_the_same_effect(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(fresh(), str(written(tmp_path, "peft", MIXED)))
    assert_deltas(merged_deltas(model.merge_and_unload(), tiny.transformer("t2v")), MIXED)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_wrote(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=3.0, target_modules=["to_q", "ffn.net.2"], use_rslora=rslora,
                        init_lora_weights=False, rank_pattern={"blocks.1.attn1.to_q": 6},
                        alpha_pattern={"blocks.1.attn1.to_q": 2.5})
    model = get_peft_model(fresh(), config)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    assert lora.format == "peft"
    assert lora.pairs["blocks.1.self_attn.q"].rank == 6
    assert_deltas(merged_deltas(model.merge_and_unload(), tiny.transformer("t2v")), lora.pairs)


def test_a_file_that_diffusers_wrote(tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    module = fresh()
    module.add_adapter(LoraConfig(r=4, lora_alpha=6.0, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(module),
                                  **_collate_lora_metadata({"transformer": module}))
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert (lora.format, lora.pairs["blocks.0.cross_attn.v"].alpha) == ("diffusers", 6.0)
    module.fuse_lora()
    module.unload_lora()
    assert_deltas(merged_deltas(module, tiny.transformer("t2v")), lora.pairs)


# What others write.

def saved(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "other.safetensors", metadata)
    return folder / "other.safetensors"


A, B = torch.linspace(-1, 1, 128).reshape(4, 32), torch.linspace(-2, 1, 128).cos().reshape(32, 4)


@pytest.mark.parametrize(("keys", "format", "alpha"), [
    (("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight"),
     "universal", 4.0),
    (("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
      "diffusion_model.blocks.0.self_attn.q.alpha"), "universal", 2.0),
    (("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "diffusion_model.blocks.0.self_attn.q.lora_up.weight"),
     "comfy_updown", 4.0),
    (("transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.lora_B.weight"),
     "diffusers", 4.0),
    (("blocks.0.attn1.to_q.lora_A.weight", "blocks.0.attn1.to_q.lora_B.weight"), "diffsynth", 4.0),
    (("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.lora_up.weight",
      "lora_unet_blocks_0_self_attn_q.alpha"), "kohya", 2.0),
    (("lycoris_blocks_0_attn1_to_q.lora_down.weight", "lycoris_blocks_0_attn1_to_q.lora_up.weight",
      "lycoris_blocks_0_attn1_to_q.alpha"), "lycoris", 2.0),
])
def test_alpha_is_found_where_each_format_keeps_it(keys: tuple[str, ...], format: str, alpha: float, tmp_path: Path
                                                   ) -> None:
    lora = read_lora(saved(tmp_path, dict(zip(keys, (A, B, torch.tensor(2.0)), strict=False))))
    assert lora.format == format
    assert list(lora.pairs) == ["blocks.0.self_attn.q"]
    assert lora.pairs["blocks.0.self_attn.q"].alpha == alpha
    assert torch.allclose(lora.pairs["blocks.0.self_attn.q"].delta(), alpha / 4 * B @ A, atol=1e-5)


DISTILL = {
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight": A,
    "diffusion_model.blocks.0.self_attn.q.lora_up.weight": B,
    "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(32),
    "diffusion_model.blocks.0.norm3.diff": torch.ones(32),
    "diffusion_model.head.head.diff": torch.ones(64, 32),
    "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 32),
    "diffusion_model.head.modulation.diff_m": torch.ones(1, 2, 32),
}
LOHA = {f"lora_unet_blocks_0_ffn_2.{x}": torch.ones(4, 4) for x in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
DORA = {"transformer.blocks.0.attn1.to_q.lora_A.weight": A, "transformer.blocks.0.attn1.to_q.lora_B.weight": B,
        "transformer.blocks.0.attn1.to_q.lora_magnitude_vector.weight": torch.ones(32)}


def test_extra_tensors_are_kept_by_name_and_refused_where_ignored(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, DISTILL))
    assert set(lora.extras) == {"blocks.0.self_attn.q.diff_b", "blocks.0.norm3.diff", "head.head.diff",
                                "blocks.0.diff_m", "head.modulation.diff_m"}
    write_lora(tmp_path / "back.safetensors", lora.pairs, "comfy_updown", {}, extras=lora.extras)
    assert set(load_file(tmp_path / "back.safetensors")) == set(DISTILL)
    for format in GRAMMARS.keys() - {"comfy_updown"}:
        with pytest.raises(UserError, match=r"cannot hold tensors that its readers ignore: .*diff"):
            write_lora(tmp_path / "no", lora.pairs, format, {}, extras=lora.extras)
    assert not (tmp_path / "no").exists()


def test_loha_passes_through_formats_that_hold_it(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, {**LOHA, "lora_unet_blocks_0_ffn_2.alpha": torch.tensor(2.0)}))
    assert lora.pairs == {}
    assert len(lora.extras) == 5
    write_lora(tmp_path / "to.safetensors", {}, "comfy_updown", {}, extras=lora.extras)
    assert "diffusion_model.blocks.0.ffn.2.hada_w1_a" in load_file(tmp_path / "to.safetensors")
    with pytest.raises(UserError, match="the format universal cannot hold"):
        write_lora(tmp_path / "no", {}, "universal", {}, extras=lora.extras)


def test_dora_is_written_only_where_it_loads_right(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, DORA))
    assert list(lora.extras) == ["blocks.0.self_attn.q.lora_magnitude_vector"]
    for format in GRAMMARS:
        if format in ("diffusers", "peft"):
            assert worst_difference(lora, read_lora(written(tmp_path, format, lora.pairs, extras=lora.extras)))[0] == 0
        else:
            with pytest.raises(UserError, match="lora_magnitude_vector") as caught:
                write_lora(tmp_path / "no", lora.pairs, format, {}, extras=lora.extras)
            assert "choose a format that can: diffusers, peft; for ComfyUI" in caught.value.next_step
            assert "wantrain merge" in caught.value.next_step


H = "lora_unet_blocks_0_ffn_2"
LOKR = {f"{H}.lokr_w1": torch.ones(4, 8), f"{H}.lokr_w2_a": torch.ones(8, 2), f"{H}.lokr_w2_b": torch.ones(2, 8)}


@pytest.mark.parametrize(("tensors", "message"), [
    ({n: t for n, t in LOHA.items() if "w2_b" not in n}, "blocks.0.ffn.2 lacks hada_w2 or a half of it"),
    ({n: t for n, t in LOKR.items() if "w1" not in n}, "lacks lokr_w1 or a half of it"),
    ({n: t for n, t in LOKR.items() if "w2_a" not in n}, "lacks lokr_w2 or a half of it"),
    ({**LOKR, f"{H}.lokr_w2_b": torch.ones(3, 8)}, "do not multiply"),
    ({**LOHA, f"{H}.hada_w1_a": torch.ones(4, 9)}, "do not multiply"),
    ({**LOHA, f"{H}.alpha": torch.tensor(0.0)}, "has the alpha 0.0"),
    ({**LOHA, "lora_unet_blocks_1_ffn_2.alpha": torch.tensor(4.0)}, "blocks.1.ffn.2 has an alpha, and nothing"),
    ({**LOHA, f"{H}.hada_w1_a": torch.full((4, 4), float("nan"))}, "is not finite"),
])
def test_damaged_loha_and_lokr_are_refused_by_name(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
                                                   ) -> None:
    assert read_lora(saved(tmp_path, LOKR)).extras
    with pytest.raises(ContainerError, match=message):
        read_lora(saved(tmp_path, tensors))


@pytest.mark.parametrize(("high", "low"), [
    ("diffusion_model.transformer_1.blocks.0.self_attn.q", "diffusion_model.transformer_2.blocks.0.self_attn.q"),
    ("transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"),
])
def test_a_file_with_both_experts(high: str, low: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {f"{stem}.lora_{x}.weight": t * (1 + i) for i, stem in enumerate((high, low))
                            for x, t in (("A", A), ("B", B))})
    with pytest.raises(ContainerError, match="a LoRA for each of the two experts"):
        read_lora(path)
    assert torch.equal(read_lora(path, "high").pairs["blocks.0.self_attn.q"].a, A)
    assert torch.equal(read_lora(path, "low").pairs["blocks.0.self_attn.q"].a, 2 * A)


# What a format cannot express.

def test_convolutions_only_where_they_load(tmp_path: Path) -> None:
    pairs = {"patch_embedding": LoraPair(torch.randn(4, 16, 1, 2, 2), torch.randn(32, 4, 1, 1, 1), 4.0)}
    assert pairs["patch_embedding"].delta().shape == (32, 16, 1, 2, 2)
    for format, grammar in GRAMMARS.items():
        if grammar.conv:
            read = read_lora(written(tmp_path / format, format, pairs))
            assert differ(pairs, read.pairs)[0] < 1e-6
        else:
            with pytest.raises(UserError, match="convolutions, which its readers refuse: patch_embedding"):
                written(tmp_path / format, format, pairs)


def test_modules_without_a_diffusers_name(tmp_path: Path) -> None:
    pairs = {"control_adapter.conv": LoraPair(torch.randn(4, 8, 2, 2), torch.randn(32, 4, 1, 1), 4.0)}
    for format in ("diffusers", "peft", "lycoris"):
        with pytest.raises(UserError, match=r"modules that diffusers does not have: control_adapter\.conv"):
            written(tmp_path, format, pairs)
    assert list(read_lora(written(tmp_path, "kohya", pairs)).pairs) == ["control_adapter.conv"]


def test_bf16_only_where_folding_is_exact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alpha/rank that cannot be folded exactly in torch.bfloat16"):
        written(tmp_path, "universal", dtype=torch.bfloat16)
    exact = some_pairs(rank=8, alpha=2.0)
    read = read_lora(written(tmp_path, "universal", exact, dtype=torch.bfloat16))
    rounded = {m: LoraPair(p.a.bfloat16(), p.b.bfloat16(), p.alpha) for m, p in exact.items()}
    assert differ(rounded, read.pairs)[0] < 1e-7
    assert read_lora(written(tmp_path, "kohya", dtype=torch.bfloat16)).pairs["blocks.0.ffn.0"].alpha == 4.5


# Damaged files.

def _edit(format: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], keep_metadata: bool = False
          ) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        lora = read_lora(written(folder, format))
        file = lora.path / PEFT_WEIGHTS if format == "peft" else lora.path
        save_file(change(load_file(file)), file, lora.metadata if keep_metadata else {"format": "pt"})
        return lora.path

    return make


def _without(mark: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if mark not in name}


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def _with(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {**tensors, name: tensor}


def _k_and_v_swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    swap = {"attn.k.": "attn.v.", "attn.v.": "attn.k."}
    return {next((n.replace(o, w) for o, w in swap.items() if o in n), n): t for n, t in tensors.items()}


def _transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.T.contiguous() if t.ndim == 2 else t for name, t in tensors.items()}


def _exchanged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {next(n.replace(o, w) for o, w in swap.items() if o in n): t for n, t in tensors.items()}


def _cut(keep: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = written(folder, "universal")
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        return path

    return make


def _pickle(folder: Path) -> Path:
    torch.save({"blocks.0.self_attn.q.lora_A.default.weight": A}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def _huge_header(folder: Path) -> Path:
    (folder / "lora.safetensors").write_bytes(struct.pack("<Q", 10 * 2**30) + b'{"__metadata__":{}}')
    return folder / "lora.safetensors"


def _peft_without_config(folder: Path) -> Path:
    path = written(folder, "peft")
    (path / PEFT_CONFIG).unlink()
    return path


def _peft_bad_config(folder: Path) -> Path:
    path = written(folder, "peft")
    (path / PEFT_CONFIG).write_text("[1]")
    return path


Q = "diffusion_model.blocks.0.self_attn.q"
NAN = torch.full((6, 32), float("nan"))
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "lost alpha, kohya": (_edit("kohya", _without("blocks_0_self_attn_q.alpha")), "blocks.0.self_attn.q has no alpha"),
    "lost alpha, fun": (_edit("fun", _without(".alpha")), "has no alpha"),
    "lost alpha, lycoris": (_edit("lycoris", _without(".alpha")), "has no alpha"),
    "lost alpha, peft": (_peft_without_config, f"has no {PEFT_CONFIG}"),
    "peft config is no object": (_peft_bad_config, "not a JSON object"),
    "k and v swapped": (_edit("universal", _k_and_v_swapped, True), "not those that wantrain wrote"),
    "a block missing": (_edit("universal", _without("blocks.1."), True), "not those that wantrain wrote"),
    "a tensor rescaled": (_edit("kohya", _with("lora_unet_blocks_0_ffn_0.alpha", torch.tensor(1.0)), True),
                          "not those that wantrain wrote"),
    "A without B": (_edit("universal", _without(f"{Q[16:]}.lora_B")), "blocks.0.self_attn.q has A but no B"),
    "B without A": (_edit("kohya", _without("blocks_1_ffn_2.lora_down")), "blocks.1.ffn.2 has B but no A"),
    "transposed": (_edit("universal", _transposed), "do not multiply .*transposed"),
    "transposed, attention alone": (_edit("universal", lambda tensors: _transposed(_without("ffn")(tensors))),
                                    "rank above the module's size, as all modules here .*transposed"),
    "A and B exchanged": (_edit("universal", _exchanged), "do not multiply .*exchanged"),
    "two ranks": (_edit("universal", _with(f"{Q}.lora_A.weight", torch.ones(5, 32))), "do not multiply .*two LoRAs"),
    "NaN": (_edit("universal", _with(f"{Q}.lora_A.weight", NAN)), r"blocks.0.self_attn.q.lora_A.weight is not finite"),
    "infinite diff": (_edit("comfy_updown", _with(f"{Q}.diff_b", torch.tensor([math.inf]))), "diff_b is not finite"),
    "alpha zero": (_edit("kohya", _with("lora_unet_blocks_0_ffn_0.alpha", torch.tensor(0.0))),
                   "alpha 0.0, so no effect"),
    "wrong prefix": (_edit("universal", _renamed("diffusion_model.", "diffusion.model.")), "is no known module"),
    "diffusers names under ComfyUI's prefix": (_edit("diffusers", _renamed("transformer.", "diffusion_model.")),
                                               "is no official module"),
    "official names under diffusers' prefix": (_edit("universal", _renamed("diffusion_model.", "transformer.")),
                                               "is no diffusers module"),
    "another model's LoRA": (_edit("kohya", _renamed("self_attn_q", "img_attn_qkv")), "is no official module"),
    "text encoder too": (_edit("kohya", _with("lora_te_x.lora_up.weight", torch.ones(2, 2))), "mixes prefixes"),
    "two formats": (_edit("universal", _with("transformer.blocks.0.attn1.to_q.lora_A.weight", A)), "mixes prefixes"),
    "a base checkpoint": (_edit("diffsynth", lambda _: {"blocks.0.self_attn.q.weight": torch.ones(2, 2)}),
                          "is no tensor of a LoRA .*base checkpoint"),
    "truncated": (_cut(0.8), "not readable as safetensors"),
    "truncated in the header": (_cut(0.01), "header claims"),
    "a pickle": (_pickle, "is named .safetensors but is pth"),
    "header of 10 GB": (_huge_header, "header claims 10737418240 bytes"),
    "no such file": (lambda folder: folder / "absent.safetensors", "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    path = make(tmp_path)
    with pytest.raises(ContainerError, match=message) as caught:
        read_lora(path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.cause


def test_the_untouched_files_of_the_faults_read_well(tmp_path: Path) -> None:
    """So that each refusal above is of the fault and not of the way the file was made."""
    for format in GRAMMARS:
        path = _edit(format, dict)(tmp_path / format)
        pairs = read_lora(path).pairs
        assert set(pairs) == set(MODULES)
        shutil.rmtree(tmp_path / format)


def test_metadata_of_the_diffusers_format_is_json_under_a_prefix(tmp_path: Path) -> None:
    metadata = json.loads(read_lora(written(tmp_path, "diffusers", MIXED)).metadata["lora_adapter_metadata"])
    assert metadata["transformer.r"] == 6
    assert metadata["transformer.lora_alpha"] == 6, "alpha is in B, for the readers that do not look here"
    assert metadata["transformer.rank_pattern"] == metadata["transformer.alpha_pattern"] == {}


def test_metadata_of_peft_says_each_alpha(tmp_path: Path) -> None:
    config = json.loads((written(tmp_path, "peft", MIXED) / PEFT_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 4.5, {})
    assert config["alpha_pattern"]["blocks.0.attn1.to_k"] == 14.0, "alpha 7 at rank 3, padded to 6"


@pytest.mark.parametrize(("format", "pairs", "said"), [
    ("universal", some_pairs(), ("6", "6")),
    ("kohya", some_pairs(), ("6", "4.5")),
    ("kohya", MIXED, ("6", "Dynamic")),
    ("diffusers", MIXED, ("6", "6")),
])
def test_rank_and_alpha_in_the_metadata_are_those_of_the_tensors(format: str, pairs: dict[str, LoraPair],
                                                                 said: tuple[str, str], tmp_path: Path) -> None:
    write_lora(tmp_path / "x.safetensors", pairs, format, {"ss_network_dim": "99", "ss_network_alpha": "98"})
    metadata = read_lora(tmp_path / "x.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == said


def test_metadata_of_a_lokr_without_a_rank_says_none(tmp_path: Path) -> None:
    extras = {"blocks.0.ffn.2.lokr_w1": torch.ones(4, 8), "blocks.0.ffn.2.lokr_w2": torch.ones(8, 8),
              "blocks.0.ffn.2.alpha": torch.tensor(1.0)}
    write_lora(tmp_path / "x.safetensors", {}, "kohya", {"ss_network_dim": "4", "ss_network_alpha": "4"}, extras=extras)
    assert not {"ss_network_dim", "ss_network_alpha"} & read_lora(tmp_path / "x.safetensors").metadata.keys()


@pytest.mark.parametrize(("name", "dtype"), [("hada_w1_a", torch.bfloat16), ("diff", torch.bfloat16),
                                             ("alpha", torch.float32), (MAGNITUDE, torch.float32)])
def test_the_dtype_holds_for_all_but_alphas_and_magnitudes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    extras = {"diff": {"blocks.0.norm3.diff": torch.ones(32)},
              MAGNITUDE: {f"blocks.0.ffn.0.{MAGNITUDE}": torch.ones(64)}}.get(
        name, {f"blocks.0.ffn.2.{leaf}": torch.ones(4, 4) for leaf in ("hada_w1_a", "hada_w1_b", "hada_w2_a",
                                                                       "hada_w2_b")}
        | {"blocks.0.ffn.2.alpha": torch.tensor(2.0)})
    pairs = some_pairs(alpha=6.0, modules=["blocks.0.ffn.0"]) if name == MAGNITUDE else {}
    format = "diffusers" if name == MAGNITUDE else "comfy_updown"
    read = read_lora(written(tmp_path, format, pairs, dtype=torch.bfloat16, extras=extras))
    assert next(tensor.dtype for key, tensor in read.extras.items() if key.endswith(name)) == dtype


def test_values_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    pairs = {"blocks.0.ffn.0": LoraPair(torch.ones(4, 32), torch.full((64, 4), 7e4), 4.0)}
    with pytest.raises(UserError, match="is not finite in float16"):
        written(tmp_path, "universal", pairs, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    assert read_lora(written(tmp_path, "universal", pairs, dtype=torch.bfloat16)).pairs


@pytest.mark.parametrize("format", GRAMMARS)
@pytest.mark.parametrize("rank", [48, 80])
def test_a_rank_above_the_modules_size_is_read_and_written(rank: int, format: str, tmp_path: Path) -> None:
    """48 is above the 32 inputs and below the 64 outputs; 80 above both, which only our digest tells from transposing.
    """
    pairs = some_pairs(rank=rank, modules=["blocks.0.ffn.0"])
    assert differ(pairs, read_lora(written(tmp_path, format, pairs)).pairs)[0] < 1e-6


def test_the_case_of_a_rank_above_the_head_goes_through_every_format(tmp_path: Path) -> None:
    case = Path("../shared/cases/lora/rank128_on_head64.safetensors")
    if not case.is_file():
        pytest.skip("the cases are not here")
    pairs = read_lora(case).pairs
    for format in GRAMMARS:
        assert differ(pairs, read_lora(written(tmp_path / format, format, pairs)).pairs)[0] < 1e-6


def test_modules_of_animate_only_under_diffusers_names(tmp_path: Path) -> None:
    pairs = {module: pair("blocks.0.self_attn.q", 4, 4.0) for module in ("face_adapter.3.to_q", "face_encoder.out_proj",
                                                                         "blocks.0.self_attn.q")}
    for format, grammar in GRAMMARS.items():
        if grammar.diffusers_names:
            assert differ(pairs, read_lora(written(tmp_path / format, format, pairs)).pairs)[0] < 1e-6
        else:
            with pytest.raises(UserError, match="modules of Wan-Animate, which have no official name here: face_adap"):
                written(tmp_path / format, format, pairs)


def test_check_fit() -> None:
    shapes = {name: tuple(t.shape) for name, t in tiny.official_transformer(tiny.transformer("t2v")).items()}
    lora = LoraFile(Path("x"), "universal", some_pairs())
    check_fit(lora, shapes)
    lora.pairs["blocks.0.cross_attn.k_img"] = pair("blocks.0.self_attn.q", 4, 4.0)
    with pytest.raises(ContainerError, match=r"blocks\.0\.cross_attn\.k_img is not in the base"):
        check_fit(lora, shapes)
    wide = LoraPair(torch.ones(4, 64), torch.ones(32, 4), 4.0)
    with pytest.raises(ContainerError, match=r"makes an update \[32, 64\], the base's weight is \[32, 32\]"):
        check_fit(LoraFile(Path("x"), "universal", {"blocks.0.self_attn.q": wide}), shapes)
