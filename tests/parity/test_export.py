"""The exported file against what was trained: read by diffusers, by hand, and by our own sampler."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import arguments_for
from tests.tiny_tasks import pipeline
from wantrain import cli, lora, pictures
from wantrain.config import LoraFormat
from wantrain.data import decode
from wantrain.engine import checkpoint, saved
from wantrain.models import base, comfy_workflow, lora_formats, lora_updates, lora_writing, sampling
from wantrain.models.fit import AdapterFile, fit
from wantrain.models.names import transformer_to_diffusers
from wantrain.models.variants import VARIANTS
from wantrain.recipe import exporting
from wantrain.terms import UserError

CPU = torch.device("cpu")
OWN = ("lora.alpha=3", "optim.lr=0.05")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {})


@pytest.fixture(scope="module")
def trained_once(clips, cache_dir, cached, tmp_path_factory):
    """A run of a few large steps with alpha unlike rank, exported."""
    run = tmp_path_factory.mktemp("trained") / "run"
    for verb in ("train", "export"):
        assert cli.main([verb, *arguments_for(clips, cache_dir, run), *OWN]) == 0
    return run


@pytest.fixture
def trained(trained_once, tmp_path):
    """A test's own copy of that run, in the folder that its arguments name."""
    return shutil.copytree(trained_once, tmp_path / "run")


def inputs():
    generator = torch.Generator().manual_seed(0)
    return {"hidden_states": torch.randn(1, 16, 2, 4, 6, generator=generator), "timestep": torch.tensor([700.0]),
            "encoder_hidden_states": torch.randn(1, 512, 128, generator=generator), "return_dict": False}


@torch.no_grad()
def test_diffusers_loads_the_file_and_computes_what_was_trained(trained):
    path = trained / "export" / "demo_anime.safetensors"
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    before = pipeline.transformer(**inputs())[0]
    pipeline.load_lora_weights(str(path))
    loaded = pipeline.transformer(**inputs())[0]
    own = TINY.transformer(torch.float32, CPU)
    lora.inject(own, ["attn_ffn"], lora.Spec(4, 3), seed=0)
    _, tensors = checkpoint.load(saved.steps_on_disk(trained / "checkpoints")[-1], None)
    lora.start_from(own, lora.adapter_state(checkpoint.values(tensors), lora.scales(own)))
    adapted = own(**inputs())[0]
    assert (adapted - before).abs().max() > 0.01
    torch.testing.assert_close(loaded, adapted, atol=1e-4, rtol=1e-4)


def test_the_file_holds_official_names_folded_alpha_and_provenance(trained):
    path = trained / "export" / "demo_anime.safetensors"
    tensors = load_file(path)
    pattern = r"diffusion_model\.blocks\.\d\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])\.lora_[AB]\.weight"
    assert all(re.fullmatch(pattern, name) for name in tensors)
    assert len(tensors) == 120
    _, stored = checkpoint.load(saved.steps_on_disk(trained / "checkpoints")[-1], None)
    a, b = (stored[f"blocks.2.ffn.net.0.proj.lora_{x}.default.weight|value"] for x in "AB")
    official = "diffusion_model.blocks.2.ffn.0.lora_{}.weight"
    delta = tensors[official.format("B")] @ tensors[official.format("A")]
    torch.testing.assert_close(delta, 3 / 4 * (b @ a), rtol=1e-6, atol=1e-7)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4"), "alpha is in the tensors"
    assert metadata["modelspec.trigger_phrase"] == "sqstyle"
    run = json.loads((trained / "run.json").read_text())
    assert metadata["wantrain.base_digest"] == run["base_digest"]
    assert metadata["wantrain.manifest_digest"] == run["manifest_digest"]


def test_a_config_that_contradicts_the_checkpoint_is_refused_with_both_values(trained, wantrain, capsys):
    path = trained / "export" / "demo_anime.safetensors"
    before = path.read_bytes()
    for key, old, new in (("lora.rank", "4", "8"), ("lora.alpha", "3.0", "16.0"), ("lora.kind", "lora", "rslora"),
                          ("lora.targets", "['attn_ffn']", "['attn']"), ("train.seed", "0", "1")):
        assert wantrain("export", *OWN, f"{key}={new.replace(chr(39), '')}") == 2
        assert f"\n  {key}: {old} -> {new}\n" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_export_needs_the_checkpoint_alone(clips, cache_dir, arguments, tmp_path, capsys):
    """With base, clips, cache and run folder's other files gone, even from the mirror alone, the bytes are the same."""
    shutil.copytree(base.EMBEDDED, tmp_path / "base")
    shutil.copytree(clips, tmp_path / "clips")
    own = [a.replace(str(clips), str(tmp_path / "clips")) for a in arguments]
    own += [f"model.path={tmp_path / 'base'}", f"train.mirror={tmp_path / 'mirror'}", "train.num_steps=1",
            f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.main(["cache", *own]) == 0
    assert cli.main(["train", *own]) == 0
    assert cli.main(["export", *own]) == 0
    file = tmp_path / "run" / "export" / "demo_anime.safetensors"
    first = file.read_bytes()
    for gone in ("base", "clips", "cache", "run"):
        shutil.rmtree(tmp_path / gone)
    assert cli.main(["export", *own]) == 0
    assert file.read_bytes() == first
    assert "against the checkpoint" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_what_is_read_back_is_compared_with_peft_itself(tmp_path, kind):
    """The comparison says 0 for a right file and the true error for a wrong one, by what PEFT makes of the weights."""
    transformer = TINY.transformer(torch.float32, CPU)
    lora.inject(transformer, [r"blocks\.0\..*"], lora.Spec(4, 3, kind), seed=0)
    for parameter in lora.trainable_parameters(transformer).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    state = lora.adapter_state(lora.trainable_parameters(transformer), lora.scales(transformer))
    pairs, extras = lora_updates.from_adapter(state)
    path, form = tmp_path / "x.safetensors", {"lora": "universal", "rslora": "universal", "dora": "diffusers"}.get(kind)
    lora_writing.write_lora(path, pairs, form or "kohya", {}, dtype=torch.float32, extras=extras)
    assert lora_updates.refuse_difference(path, lora_formats.read_lora(path), state, "float32") < 1e-6
    module = "blocks.0.ffn.net.2"
    state.scales[module] *= 1.01
    with pytest.raises(UserError, match=rf"the delta of {module} differs from the checkpoint's by 9\.9e-03"):
        lora_updates.refuse_difference(path, lora_formats.read_lora(path), state, "float32")
    state.scales[module] /= 1.01
    layer = transformer.get_submodule(module)
    want = layer.get_delta_weight("default") if kind != "dora" else layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    leaves = state.tensors[module]
    got = state.scales[module] * (leaves["lora_B"] @ leaves["lora_A"] if "lora_A" in leaves
                                  else lora_updates._product(leaves).float())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_refused_where_folding_alpha_would_round(trained, wantrain, capsys):
    assert wantrain("export", *OWN, "export.dtype=bfloat16") == 2
    assert "alpha/rank" in capsys.readouterr().err


def test_an_export_that_reads_back_wrong_is_an_error(trained, wantrain, capsys, monkeypatch):
    """A writer that lost alpha, as half the field's do; and one that was given another alpha than was trained."""
    write, from_adapter, folder = lora_updates.write_lora, lora_updates.from_adapter, trained / "export"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def without_alpha(pairs):
        return {m: lora_formats.LoraPair(p.a, p.b, p.rank) for m, p in pairs.items()}

    def losing(path, pairs, *rest, **options):
        write(path, without_alpha(pairs), *rest, **options)

    def misread(state):
        pairs, extras = from_adapter(state)
        return without_alpha(pairs), extras

    for room, name, wrong, said in ((lora_updates, "write_lora", losing, "differs by"),
                                    (exporting, "from_adapter", misread, "differs from the checkpoint's by")):
        with monkeypatch.context() as patched:
            patched.setattr(room, name, wrong)
            assert wantrain("export", *OWN, "run.name=other") == 2
        assert re.search(f"other.safetensors: read back, the delta of .* {said}", capsys.readouterr().err)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "one is left"


def test_sampling_with_a_named_file_and_export_need_no_clips(trained, wantrain, tmp_path):
    gone = [f"data.sources.{name}.path={tmp_path / 'gone'}" for name in ("style", "regularisation")]
    gone += [f"data.heldout={tmp_path / 'gone'}", f"data.cache_dir={tmp_path / 'empty'}"]
    assert wantrain("export", *OWN, *gone, "run.name=elsewhere") == 0
    file = trained / "export" / "elsewhere.safetensors"
    assert wantrain("sample", *OWN, *gone, f"sampler.loras={file}", "sampler.strengths=[1]", "sampler.num_steps=2") == 0
    assert len(list((trained / "samples").glob("*.mp4"))) == 1
    assert wantrain("check", *OWN, *gone) == 2


def test_every_format_of_the_config_reads_back_as_what_was_trained(trained, wantrain):
    """The universal file is held against the checkpoint in the tests above, and the others against it."""
    files = {}
    for form in LoraFormat:
        assert wantrain("export", *OWN, f"export.format={form.name}") == 0
        name = "demo_anime_peft" if form is LoraFormat.peft else "demo_anime.safetensors"
        files[form.name] = lora_formats.read_lora(trained / "export" / name)
        assert files[form.name].format == form.name
        assert lora_updates.worst_difference(files["universal"], files[form.name])[0] < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_other_formats_load_in_diffusers_with_the_same_effect(trained, wantrain, form):
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(str(trained / "export" / "demo_anime.safetensors"))
    universal = pipeline.transformer(**inputs())[0]
    assert wantrain("export", *OWN, f"export.format={form}") == 0
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(str(trained / "export" / "demo_anime.safetensors"))
    torch.testing.assert_close(pipeline.transformer(**inputs())[0], universal, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_merged_transformer_computes_what_base_and_lora_do(trained, tmp_path, capsys, layout):
    given, out = trained / "export" / "demo_anime.safetensors", tmp_path / "merged.safetensors"
    merge = ["merge", str(base.EMBEDDED / "transformer"), f"{given}=0.5", str(given), str(out)]
    assert cli.main([*merge, f"layout={layout}", "dtype=float32"]) == 0
    assert "60 of" in capsys.readouterr().out
    merged = base.find(VARIANTS["tiny_wan"], "embedded", {"transformer": str(out)})
    assert f"{layout} names" in merged.detected()
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(str(given), adapter_name="a")
    pipeline.set_adapters(["a"], [1.5])
    want = pipeline.transformer(**inputs())[0]
    torch.testing.assert_close(merged.transformer(torch.float32, CPU)(**inputs())[0], want, atol=2e-4, rtol=2e-4)
    assert cli.main([*merge, "layout=zip"]) == 2
    assert cli.main(["merge", str(given), str(out)]) == 2


@pytest.mark.parametrize("form", ["universal", "kohya"])
def test_training_starts_from_an_exported_lora(trained, wantrain, tmp_path, capsys, form):
    """With a larger rank and another alpha the first loss is that of the LoRA, and step 0 exports its deltas."""
    assert wantrain("export", *OWN, f"export.format={form}") == 0
    given = trained / "export" / "demo_anime.safetensors"
    more = [f"run.dir={tmp_path / 'more'}", f"lora.start_from={given}", "lora.rank=6", "lora.alpha=12"]
    more += ["train.num_steps=1", "optim.lr=1e-12", "optim.weight_decay=0"]
    assert wantrain("train", *more) == 0
    assert wantrain("export", *more) == 0
    old, new = (lora_formats.read_lora(run / "export" / "demo_anime.safetensors")
                for run in (trained, tmp_path / "more"))
    assert lora_updates.worst_difference(old, new)[0] < 1e-5
    assert wantrain("train", *more[:2], f"run.dir={tmp_path / 'x'}", "lora.rank=2") == 2
    assert "above lora.rank = 2" in capsys.readouterr().err
    assert wantrain("train", *more, f"run.dir={tmp_path / 'y'}", "lora.targets=[attn]") == 2
    assert "lora.targets does not match" in capsys.readouterr().err


def test_a_file_without_effect_is_refused_by_the_sampler(tmp_path):
    save_file({"blocks.0.attn1.to_qq.lora_A.weight": torch.zeros(2, 192),
               "blocks.0.attn1.to_qq.lora_B.weight": torch.zeros(192, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is no known module of a Wan transformer"):
        fit(TINY.transformer(torch.float32, CPU), CPU, [AdapterFile(tmp_path / "x.safetensors")])


def test_a_comfyui_workflow_stands_beside_the_file_where_comfyui_reads_it(trained, wantrain, capsys, monkeypatch):
    path = trained / "export" / "demo_anime.workflow.json"
    assert not path.exists(), "ComfyUI has no tiny_wan"
    monkeypatch.setitem(comfy_workflow.FILES, "tiny_wan", "tiny.safetensors")
    capsys.readouterr()
    assert wantrain("export", *OWN, "sampler.prompts=['sqstyle, a boat']", "sampler.strengths=[0,0.7]") == 0
    assert f"wrote {path}: drop it into ComfyUI" in capsys.readouterr().out
    values = {node["type"]: node["widgets_values"] for node in json.loads(path.read_text())["nodes"]}
    assert values["LoraLoaderModelOnly"] == ["demo_anime.safetensors", 0.7]
    assert values["ModelSamplingSD3"] == [8.0]
    texts = [node["widgets_values"] for node in json.loads(path.read_text())["nodes"]
             if node["type"] == "CLIPTextEncode"]
    assert texts[0] == ["sqstyle, a boat"]
    assert wantrain("export", *OWN, "export.format=diffusers") == 0
    assert "no ComfyUI workflow: it" in capsys.readouterr().out
    assert not path.exists()


def test_sample_writes_playable_videos_whose_strength_0_is_the_base(trained, wantrain):
    assert wantrain("sample", "sampler.seeds=[1,2]", "sampler.strengths=[0,0.5,1]") == 0
    folder = trained / "samples"
    assert len(list(folder.glob("*.mp4"))) == 6
    assert Image.open(folder / "contact_sheet.png").size[0] > 3 * 200
    plain = pipeline(TINY)
    settings = sampling.Settings(2, (4.0, 4.0), 3.0, sampling.Bucket(5, 32, 48), "")
    want = sampling.sample(plain, "a square", 1, settings)
    pictures.write_mp4(trained / "want.mp4", want, 16)
    same, other = (decode.read_clip(folder / f"000_{column}.mp4", 0, None, 16, settings.bucket)
                   for column in ("base", "strength_1"))
    wanted = decode.read_clip(trained / "want.mp4", 0, None, 16, settings.bucket)
    near, far = ((frames.float() - wanted.float()).abs().mean() for frames in (same, other))
    assert near < 3 < far, "two loads of one base differ by 1e-7, which x264 may enlarge; a LoRA differs by far more"


@pytest.mark.parametrize(("kind", "form"), [
    ("dora", "diffusers"), ("lokr", "comfy_updown"),
    *(pytest.param(*given, marks=pytest.mark.slow) for given in (("rslora", "universal"), ("loha", "comfy_updown")))])
def test_every_kind_trains_exports_and_comes_back(wantrain, tmp_path, capsys, kind, form):
    """The file in the sampler's pipeline computes what the checkpoint's adapter does; universal is refused."""
    own = [f"lora.kind={kind}", "lora.rank_pattern={attn: 2}", "optim.lr=0.05", "train.num_steps=2"]
    if kind != "rslora":
        for verb in ("check", "train"):  # before anything is loaded, and not when all is trained
            assert wantrain(verb, *own) == 2
            assert f"choose a format that can: {form}" in capsys.readouterr().err
    own.append(f"export.format={form}")
    assert wantrain("train", *own) == 0
    if kind != "rslora":
        assert wantrain("export", *own, "export.format=universal") == 2
        assert f"choose a format that can: {form}" in capsys.readouterr().err
    assert wantrain("export", *own) == 0
    _assert_pipeline_computes_the_checkpoint(tmp_path / "run", kind)


@torch.no_grad()
def _assert_pipeline_computes_the_checkpoint(run, kind):
    trained_on = TINY.transformer(torch.float32, CPU)
    before = trained_on(**inputs())[0]
    lora.inject(trained_on, ["attn_ffn"], lora.Spec(4, 4, kind, {"attn": 2}), seed=0)
    _, tensors = checkpoint.load(saved.steps_on_disk(run / "checkpoints")[-1], None)
    lora.start_from(trained_on, lora.adapter_state(checkpoint.values(tensors), lora.scales(trained_on)))
    sampled_with = TINY.transformer(torch.float32, CPU)
    fit(sampled_with, CPU, [AdapterFile(run / "export" / "demo_anime.safetensors")])
    after = trained_on(**inputs())[0]
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(sampled_with(**inputs())[0], after, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_base_with_merged_loras_is_base_and_loras(trained, tmp_path):
    given = trained / "export" / "demo_anime.safetensors"
    merged = base.find(VARIANTS["tiny_wan"], "embedded", {}, [f"{given}=0.5", str(given)])
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(str(given), adapter_name="a")
    pipeline.set_adapters(["a"], [1.5])
    want = pipeline.transformer(**inputs())[0]
    torch.testing.assert_close(merged.transformer(torch.float32, CPU)(**inputs())[0], want, atol=2e-4, rtol=2e-4)
    digests = {base.find(VARIANTS["tiny_wan"], "embedded", {}, loras).digest("transformer", tmp_path / "memo")
               for loras in ([], [str(given)], [f"{given}=0.5"], [f"{given}=0.5", str(given)])}
    assert len(digests) == 4
    with pytest.raises(UserError, match="'much' is not a number"):
        base.find(VARIANTS["tiny_wan"], "embedded", {}, [f"{given}=much"])


def test_training_on_top_of_a_merged_lora(trained, wantrain, tmp_path, capsys):
    """Its loss starts where the merged LoRA's training ended, the export holds the new part alone, and says so."""
    given = trained / "export" / "demo_anime.safetensors"
    own = [f"run.dir={tmp_path / 'top'}", f"model.merge=[{given}]", "train.num_steps=1", "optim.lr=1e-3"]
    going_on = [f"run.dir={tmp_path / 'on'}", f"lora.start_from={given}", "train.num_steps=1", "optim.lr=1e-3"]
    assert wantrain("train", *own) == 0
    assert wantrain("train", *going_on) == 0
    first, second = (json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
                     for run in ("top", "on"))
    assert first == pytest.approx(second, rel=1e-5)
    assert wantrain("train", *own, "model.merge=[]", "train.num_steps=2") == 2
    assert "(base weights)" in capsys.readouterr().err
    assert wantrain("export", *own) == 0
    file = lora_formats.read_lora(tmp_path / "top" / "export" / "demo_anime.safetensors")
    assert file.metadata["wantrain.merged"] == f"{given.name}=1", "no folder of this machine"
    old = lora_formats.read_lora(given)
    assert all(pair.delta().norm() < 0.2 * old.pairs[module].delta().norm() for module, pair in file.pairs.items())


def test_a_peft_export_is_a_folder_that_samples_and_merges(trained, wantrain):
    assert wantrain("export", *OWN, "export.format=peft") == 0
    folder = trained / "export" / "demo_anime_peft"
    assert (folder / "adapter_config.json").is_file()
    assert wantrain("check", f"model.merge=['{folder}=0.5']") == 0
    assert wantrain("sample", "export.format=peft", "sampler.strengths=[1]") == 0
    assert len(list((trained / "samples").glob("*.mp4"))) == 1


@torch.no_grad()
def test_merging_into_a_diffusers_folder(trained, tmp_path):
    given, out = trained / "export" / "demo_anime.safetensors", tmp_path / "merged"
    assert cli.main(["merge", str(base.EMBEDDED), str(given), str(out), "--layout", "diffusers", "dtype=float32"]) == 0
    pipeline = WanPipeline.from_pretrained(base.EMBEDDED, dtype=torch.float32)
    pipeline.load_lora_weights(str(given))
    merged = WanTransformer3DModel.from_pretrained(out)
    torch.testing.assert_close(merged(**inputs())[0], pipeline.transformer(**inputs())[0], atol=2e-4, rtol=2e-4)
    file = tmp_path / "official.safetensors"
    assert cli.main(["merge", str(base.EMBEDDED / "transformer"), str(given), str(file)]) == 0
    assert cli.main(["merge", str(file), str(given), str(tmp_path / "again"), "layout=diffusers"]) == 0
    assert WanTransformer3DModel.from_pretrained(tmp_path / "again").config.num_layers == 6
    assert cli.main(["merge", str(base.EMBEDDED), str(given), str(tmp_path / "no_suffix")]) == 2


def test_extract_finds_the_lora_in_a_merged_transformer(trained, tmp_path, capsys):
    given, tuned = trained / "export" / "demo_anime.safetensors", tmp_path / "tuned.safetensors"
    out, plain = tmp_path / "out.safetensors", str(base.EMBEDDED)
    assert cli.main(["merge", plain, str(given), str(tuned), "dtype=float32"]) == 0
    assert cli.main(["extract", str(tuned), plain, str(out), "rank=4"]) == 0
    assert "rank 4 on 60 modules" in capsys.readouterr().out
    found, wanted = lora_formats.read_lora(out), lora_formats.read_lora(given)
    assert lora_updates.worst_difference(wanted, found)[0] < 1e-3, "the merged weights were rounded to float32"
    energy = json.loads(found.metadata["wantrain.energy"])
    assert len(energy) == 60
    assert min(energy.values()) > 0.9999
    assert cli.main(["extract", str(tuned), plain, str(out), "rank=2", "--format=kohya"]) == 0
    assert 0.3 < min(json.loads(lora_formats.read_lora(out).metadata["wantrain.energy"]).values()) < 0.9999
    rounded = tmp_path / "rounded.safetensors"
    assert cli.main(["merge", plain, str(given), str(rounded), "dtype=bfloat16"]) == 0
    assert cli.main(["extract", str(rounded), plain, str(out), "rank=4"]) == 0, "norms were rounded, not tuned"
    assert cli.main(["extract", plain, plain, str(out)]) == 2
    assert "hold the same weights" in capsys.readouterr().err


def test_extract_names_what_is_no_linear_weight(tmp_path, capsys):
    weights = load_file(base.EMBEDDED / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = {"blocks.0.attn1.to_q.weight": 0.1, "blocks.0.attn1.to_q.bias": 0.2, "blocks.1.norm2.weight": 0.3,
               "blocks.2.scale_shift_table": 0.4, "scale_shift_table": 0.5, "patch_embedding.weight": 0.6}
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    save_file({name: tensor.float() + changed.get(name, 0) for name, tensor in weights.items()}, tuned)
    extract = ["extract", str(tuned), str(base.EMBEDDED), str(out), "rank=4"]
    assert cli.main(extract) == 2
    assert "5 changed tensors are no Linear weight" in capsys.readouterr().err
    assert cli.main([*extract, "rest=diff"]) == 2
    assert "choose a format that can: comfy_updown" in capsys.readouterr().err
    assert cli.main([*extract, "rest=drop"]) == 0
    assert not lora_formats.read_lora(out).extras
    assert cli.main([*extract, "rest=diff", "format=comfy_updown"]) == 0
    assert set(lora_formats.read_lora(out).extras) == {
        "blocks.0.self_attn.q.diff_b", "blocks.1.norm3.diff", "blocks.2.diff_m", "head.diff_m", "patch_embedding.diff"}
    back = tmp_path / "back.safetensors"
    assert cli.main(["merge", str(base.EMBEDDED), str(out), str(back), "dtype=float32", "layout=official"]) == 0
    again, whole = load_file(back), load_file(tuned)
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, whole[transformer_to_diffusers(name)], atol=1e-5, rtol=1e-5)
