"""The folder for a model hub, read back with the hub's own card classes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import av
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from tests import run_folders
from wantrain import cli, config, pictures, results
from wantrain.models.lora_formats import LoraPair, read_lora
from wantrain.models.lora_writing import write_lora
from wantrain.models.variants import Task
from wantrain.pages import card
from wantrain.results import Prompt
from wantrain.stages import share

PLACES = ("/home/jane/clips", "~/jane")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of Wan2.1 1.3B that was exported and evaluated; its config and its videos name folders of this machine."""
    run = tmp_path_factory.mktemp("made")
    run_folders.write_training(run, model={"variant": "wan21_t2v_1b3", "path": f"{PLACES[0]}/base"},
                               lora={"rank": 4}, data={"trigger": "mystyl style", "heldout": f"{PLACES[1]}/heldout",
                                                       "cache_dir": "cache"})
    run_folders.write_results(run / "report", steps=(100, 1000), seeds=(0,), prompts=[
        Prompt("a fox | two"), Prompt("Fuchs: \u00fc")])
    for path in (run / "report").glob("step1000_1_*.mp4"):
        pictures.write_mp4(path, run_folders.frames(3, 1.0)[:5], 16, comment=f"from {PLACES[0]}")
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(4, 1536, generator=generator), torch.randn(1536, 4, generator=generator), 4.0)
    write_lora(run / "export" / "mystyle.safetensors", {"blocks.0.self_attn.q": pair}, "universal", {"a": "b"})
    (run / "export" / "mystyle.workflow.json").write_text("{}")
    return run


@pytest.fixture
def run_dir(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "mystyle"))


def test_the_card_is_what_the_hub_reads(run_dir, capsys):
    assert cli.main(["share", str(run_dir), "formats=kohya", "--license", "cc-by-4.0"]) == 0
    folder = run_dir / "share"
    said = capsys.readouterr().out
    assert f"hf upload YOU/mystyle {folder} . --private" in said
    read = ModelCard.load(folder / "README.md")
    told = read.data.to_dict()
    assert told["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "of the variant: the path is a folder of ours"
    assert (told["base_model_relation"], told["license"], told["pipeline_tag"], told["library_name"]) == (
        "adapter", "cc-by-4.0", "text-to-video", "diffusers")
    assert {"lora", "wan", "text-to-video", "template:diffusion-lora"} <= set(told["tags"])
    assert told["instance_prompt"] == "mystyl style"
    assert [one["text"] for one in told["widget"]] == ["mystyl style, a fox | two", "mystyl style, Fuchs: \u00fc"]
    for one in told["widget"]:
        assert (folder / one["output"]["url"]).is_file()
    assert "<Gallery />" in read.text
    found = results.read(run_dir / "report")
    base, own = (found.metrics[0].columns[name][0] for name in ("base", "step1000_1"))
    assert f"| style distance | {base:.4g} \u00b1 0.03 | {own:.4g} \u00b1 0.03 |" in read.text
    assert "Usable: steps 400 to 900." in read.text
    assert "1000 steps; `recipe.yaml`" in read.text
    assert str(ModelCard(read.content)) == read.content


def test_every_file_is_there_and_the_other_formats_have_the_same_effect(run_dir):
    assert cli.main(["share", str(run_dir), "formats=kohya,diffusers"]) == 0
    folder = run_dir / "share"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "recipe.yaml", "samples", "mystyle.workflow.json", "mystyle.safetensors",
        "mystyle_kohya.safetensors", "mystyle_diffusers.safetensors"}
    assert (folder / "mystyle.safetensors").read_bytes() == (run_dir / "export" / "mystyle.safetensors").read_bytes()
    [wanted] = [pair.delta() for pair in read_lora(folder / "mystyle.safetensors").pairs.values()]
    for form in ("kohya", "diffusers"):
        other = read_lora(folder / f"mystyle_{form}.safetensors")
        [delta] = [pair.delta() for pair in other.pairs.values()]
        assert (other.format, torch.allclose(delta, wanted, atol=1e-5)) == (form, True)
    (folder / "left.txt").touch()
    assert cli.main(["share", str(run_dir)]) == 0
    assert "mystyle_kohya.safetensors" not in {path.name for path in folder.iterdir()}
    assert not (folder / "left.txt").exists()


def test_no_folder_of_this_machine_is_given_away(run_dir):
    assert cli.main(["share", str(run_dir)]) == 0
    for path in (run_dir / "share").rglob("*"):
        held = path.read_bytes() if path.is_file() else b""
        assert not any(place.encode() in held for place in (*PLACES, str(run_dir.parent))), path
    [first, *_] = sorted((run_dir / "share" / "samples").iterdir())
    with av.open(str(first)) as container:
        shown = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
    with av.open(str(run_dir / "report" / "step1000_1_0_0.mp4")) as container:
        was = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
    assert torch.equal(shown, was)
    told = (run_dir / "share" / "recipe.yaml").read_text()
    assert "heldout: heldout" in told
    assert "cache_dir: cache" in told


def test_what_a_run_lacks_is_left_out_or_told(run_dir, capsys):
    for name in ("report/results.json", "judgement.json", "run.json", "export/mystyle.workflow.json"):
        (run_dir / name).unlink()
    assert cli.main(["share", str(run_dir)]) == 0
    read = ModelCard.load(run_dir / "share" / "README.md")
    assert "widget" not in read.data.to_dict()
    assert "<Gallery" not in read.text
    assert "Measured" not in read.text
    assert cli.main(["share", str(run_dir), "formats=comfyy"]) == 2
    assert "formats=comfyy is not allowed: universal," in capsys.readouterr().err
    (run_dir / "export" / "mystyle.safetensors").unlink()
    assert cli.main(["share", str(run_dir)]) == 2
    assert "has no exported LoRA" in capsys.readouterr().err


def test_the_samples_are_those_of_the_last_step_at_strength_1(run_dir):
    found = results.read(run_dir / "report")
    results.write(run_dir / "report", replace(found, columns=found.columns[::-1]))  # so that no order chooses it
    found, column, videos = share.shown(run_dir)
    assert column.id == "step1000_1"
    assert [video.prompt for _, video in videos] == [0, 1]
    export = replace(column, id="export", lora="mystyle.safetensors", step=None)
    results.write(run_dir / "report", replace(found, columns=[*found.columns, export]))
    assert share.shown(run_dir)[1] == export, "what was exported goes before its checkpoints"


def test_the_kind_of_every_task_is_told():
    assert set(card.KIND) == set(get_args(Task))
    assert share.base_of({"variant": "tiny_wan", "path": "embedded"}) == ""
    assert share.base_of({"variant": "tiny_wan", "path": "me/mine"}) == "me/mine"


def test_the_recipe_that_is_shared_is_a_config(arguments):
    own = config.load(arguments)
    text = yaml.safe_dump(share.without_places(yaml.safe_load(config.to_yaml(own))), sort_keys=False)
    again = config.load_yaml(text)
    assert (again.lora, again.sampler.prompts) == (own.lora, own.sampler.prompts)
    assert again.data.heldout == "heldout"
