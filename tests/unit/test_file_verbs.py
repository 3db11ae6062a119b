"""`inspect` and `convert` as a user calls them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from wantrain import cli
from wantrain.models import base, lora_formats, lora_updates, lora_writing
from wantrain.models.lora_formats import LoraPair
from wantrain.models.lora_updates import worst_difference


@pytest.fixture
def kohya(tmp_path):
    """A LoRA as musubi writes it: alpha 2 on rank 4."""
    generator = torch.Generator().manual_seed(0)
    pairs = {f"blocks.{i}.self_attn.{p}": LoraPair(torch.randn(4, 192, generator=generator),
                                                  torch.randn(192, 4, generator=generator), 2.0)
             for i in range(2) for p in "qkvo"}
    lora_writing.write_lora(tmp_path / "kohya.safetensors", pairs, "kohya", {"ss_output_name": "mine"})
    return tmp_path / "kohya.safetensors"


def test_convert_there_and_back_keeps_the_deltas(kohya, tmp_path, capsys):
    there, back = tmp_path / "u.safetensors", tmp_path / "k.safetensors"
    assert cli.main(["convert", str(kohya), str(there), "format=universal"]) == 0
    assert cli.main(["convert", str(there), str(back), "--format=kohya"]) == 0
    assert "8 LoRA modules" in capsys.readouterr().out
    a, b = lora_formats.read_lora(kohya), lora_formats.read_lora(back)
    assert worst_difference(a, b)[0] < 1e-6
    assert b.metadata["ss_output_name"] == "mine"
    assert all(name.startswith("diffusion_model.blocks.") for name in load_file(there))


def test_a_conversion_that_reads_back_wrong_is_an_error_and_leaves_what_was_there(kohya, tmp_path, capsys, monkeypatch):
    """A writer that lost alpha, 2 on rank 4: what it wrote acts twice as strongly."""
    out = tmp_path / "u.safetensors"
    assert cli.main(["convert", str(kohya), str(out), "format=universal"]) == 0
    before, write = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, lora_updates.write_lora

    def losing(path, pairs, *rest, **options):
        write(path, {m: LoraPair(p.a, p.b, p.rank) for m, p in pairs.items()}, *rest, **options)

    monkeypatch.setattr(lora_updates, "write_lora", losing)
    assert cli.main(["convert", str(kohya), str(out), "format=universal"]) == 2
    assert "differs by 1.0e+00" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("arguments", "said"), [
    (["x"], "convert takes IN OUT, and got 1: x"), (["IN", "OUT", "--format", "zip"], "format=zip"),
    (["IN", "OUT", "rank=3"], "rank=3"), (["gone.safetensors", "OUT"], "does not exist"),
    (["IN"], "got 1"), (["IN", "~no_such_user/out"], "~no_such_user/out: Could not determine home"),
])
def test_convert_refuses_what_it_cannot_do(kohya, tmp_path, capsys, arguments, said):
    paths = {"IN": str(kohya), "OUT": str(tmp_path / "out.safetensors")}
    assert cli.main(["convert", *(paths.get(a, a) for a in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_convert_refuses_by_name_what_the_target_cannot_hold(kohya, tmp_path, capsys):
    tensors = load_file(kohya)
    tensors["lora_unet_blocks_0_ffn_0.diff_b"] = torch.zeros(768)
    save_file(tensors, tmp_path / "diff.safetensors")
    assert cli.main(["convert", str(tmp_path / "diff.safetensors"), str(tmp_path / "o.safetensors")]) == 2
    assert "blocks.0.ffn.0.diff_b" in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_inspect_says_what_a_lora_is(kohya, capsys):
    assert cli.main(["inspect", str(kohya)]) == 0
    shown = capsys.readouterr().out
    for said in ("format kohya", "modules   8", "rank      4 on 8", "alpha     2 on rank 4 (8 modules)",
                 "loads in  ComfyUI, WanVideoWrapper, VideoX-Fun, musubi-tuner",
                 "not in    diffusers: raises: it wants", "fits      tiny_wan (",
                 "blocks.*.self_attn.q (largest: blocks.", "ss_output_name = mine"):
        assert said in shown


def test_inspect_says_what_weights_are(capsys):
    for part, said in (("transformer", "tiny_wan: from the tensors"), ("vae", "VAE"), ("text_encoder", "umT5")):
        assert cli.main(["inspect", str(base.EMBEDDED / part)]) == 0
        assert said in capsys.readouterr().out


def test_inspect_lists_the_parts_of_a_checkpoint(capsys):
    assert cli.main(["inspect", str(base.EMBEDDED)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("file      ") == 3
    for said in ("tiny_wan: from the tensors", "holds     VAE", "holds     umT5"):
        assert said in shown


def test_inspect_refuses_what_is_no_weight_file(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"<!doctype html>" * 50)
    assert cli.main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert "web page" in capsys.readouterr().err
    assert cli.main(["inspect"]) == 2
