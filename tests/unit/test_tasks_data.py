"""What a user gives a task and it does not take ends in one message: what is wrong, what is allowed, what to do now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import moving_square
from tests.tiny_tasks import write_checkpoint
from wantrain import cli, pictures
from wantrain.models.variants import VARIANTS

WIDE, NUM_FRAMES = (64, 96), 9


def film(path: Path, num_frames: int = NUM_FRAMES) -> Path:
    pictures.write_mp4(path, moving_square(len(path.name), num_frames, *WIDE), 16)
    return path


def image(path: Path) -> Path:
    pictures.write_png(path, moving_square(7, 1, *WIDE)[0])
    return path


def write_clips(folder: Path) -> Path:
    for name in ("a", "b"):
        film(folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(f"square {name}")
    return folder


def with_partners(folder: Path, **partners: str) -> Path:
    """Clips with partners: kind=ending, of the clip `a`, or of both where the ending begins with +."""
    write_clips(folder)
    for kind, ending in partners.items():
        for name in ("a", "b") if ending.startswith("+") else ("a",):
            (image if ending.endswith(".png") else film)(folder / kind / f"{name}{ending.removeprefix('+')}")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint for each task, clips without partners, and files to sample from."""
    root = tmp_path_factory.mktemp("tasks")
    for name in ("tiny_wan_control", "tiny_wan_vace", "tiny_wan_i2v", "tiny_wan_flf2v", "tiny_wan_ti2v",
                 "tiny_wan_animate"):
        write_checkpoint(root / name, name)
    write_clips(root / "clips")
    with_partners(root / "controlled", control="+.mp4")
    film(root / "film.mp4")
    film(root / "short.mp4", 3)
    image(root / "image.png")
    (root / "damaged.png").write_bytes((root / "image.png").read_bytes()[:60])
    return root


@pytest.fixture
def refused(world, tmp_path, capsys):
    """refused(verb, variant, overrides...) -> (what is wrong, what to do now)."""

    def call(verb: str, name: str, *overrides: str, clips: Path | None = None) -> tuple[str, str]:
        clips = clips or world / ("controlled" if VARIANTS[name].task in ("control", "vace") else "clips")
        size = [64, 96] if "ti2v" in name else [32, 48]
        path = "embedded" if name == "tiny_wan" else world / name
        capsys.readouterr()
        code = cli.main([verb, "recipe=demo_anime", "tracker=none", "~data.sources.regularisation",
                         "data.heldout=null", "validation.every_steps=0", f"model.variant={name}",
                         f"model.path={path}", f"data.sources.style.path={clips}",
                         f"run.dir={tmp_path / 'run'}", f"data.cache_dir={world / 'cache'}", "data.num_frames=[5]",
                         f"data.resolutions=[{size}]", "data.num_workers=1", "sampler.strengths=[0]",
                         "sampler.prompts=[a square]", "sampler.num_steps=1", "evaluate.prompts=[a square]",
                         "data.trigger=square", *overrides])
        shown = capsys.readouterr().err
        assert code == 2, shown
        assert "error: " in shown
        assert "Traceback" not in shown
        wrong, found, to_do = shown.partition("error: ")[2].partition("\n  next: ")
        assert found
        assert to_do.strip()
        return wrong, to_do.strip()

    return call


# Sources

def test_fun_control_without_control_videos(refused, world):
    wrong, to_do = refused("check", "tiny_wan_control", clips=world / "clips")
    assert wrong == "2 clips have no control, such as style/a.mp4, and tiny_wan_control (control) works from it"
    assert "column, or a folder, control" in to_do


def test_fun_control_where_one_clip_has_no_control_video(refused, tmp_path):
    wrong, _ = refused("train", "tiny_wan_control", clips=with_partners(tmp_path / "set", control=".mp4"))
    assert wrong.startswith("1 clips have no control, such as style/b.mp4")


def test_heldout_clips_need_control_videos_too(refused, world, tmp_path):
    wrong, _ = refused("check", "tiny_wan_control", f"data.heldout={world / 'clips'}",
                       clips=with_partners(tmp_path / "set", control="+.mp4"))
    assert wrong.startswith("2 clips have no control, such as heldout/a.mp4")


@pytest.mark.parametrize("partners", [{}, {"control_mask": "+.mp4"}])
def test_vace_with_neither_control_nor_reference(refused, tmp_path, partners):
    wrong, to_do = refused("check", "tiny_wan_vace", clips=with_partners(tmp_path / "set", **partners))
    assert wrong.startswith("2 clips have no control or reference, such as style/a.mp4")
    assert "control" in to_do


@pytest.mark.parametrize(("name", "kind", "ending"), [
    ("tiny_wan", "control", ".mp4"), ("tiny_wan", "reference", ".png"), ("tiny_wan_i2v", "control_mask", ".mp4"),
    ("tiny_wan_ti2v", "control", ".mp4"), ("tiny_wan_vace", "background", ".mp4"),
    ("tiny_wan_control", "reference", ".png"),
    ("tiny_wan_control", "control_mask", ".mp4")])
def test_what_a_task_would_ignore(refused, tmp_path, name, kind, ending):
    more = {"control": "+.mp4"} if name in ("tiny_wan_control", "tiny_wan_vace") else {}
    wrong, to_do = refused("train", name, clips=with_partners(tmp_path / "set", **more, **{kind: ending}))
    assert wrong.startswith(f"1 clips have a {kind}, such as style/a.mp4, and {name} (")
    assert "takes none: it would be ignored" in wrong
    assert f"take the column or the folder `{kind}` out" in to_do


@pytest.mark.parametrize(("name", "given", "lacks"), [
    ("tiny_wan_animate", "background", "control_mask"), ("tiny_wan_animate", "control_mask", "background"),
    ("tiny_wan_vace", "control_mask", "control")])
def test_a_partner_that_says_nothing_without_another(refused, tmp_path, name, given, lacks):
    rest = {"reference": "+.png"} if name == "tiny_wan_vace" else {"control": "+.mp4", "face": "+.mp4",
                                                                   "reference": "+.png"}
    wrong, to_do = refused("check", name, clips=with_partners(tmp_path / "set", **rest, **{given: ".mp4"}))
    assert wrong.startswith(f"1 clips have a {given} and no {lacks}, such as style/a.mp4, and {name} (")
    assert f"add the column or the folder `{lacks}`" in to_do


@pytest.mark.parametrize(("partners", "why"), [
    ({"reference": "+.mp4"}, "its reference {set}/reference/a.mp4 is a video of"),
    ({"control": "+.png"}, "its control {set}/control/a.png ends before it"),
])
def test_partners_of_the_wrong_kind(refused, tmp_path, partners, why):
    folder = with_partners(tmp_path / "set", **partners)
    wrong, to_do = refused("train", "tiny_wan_vace", clips=folder)
    assert wrong.startswith("2 clip(s) cannot be used")
    assert f"style/a.mp4: {why.format(set=folder)}" in wrong
    assert "data.allow_drops=true" in to_do


def test_a_control_video_that_ends_before_its_clip_and_one_that_is_damaged(refused, tmp_path):
    folder = with_partners(tmp_path / "set", control="+.mp4")
    film(folder / "control" / "a.mp4", 3)
    (folder / "control" / "b.mp4").write_bytes((folder / "control" / "b.mp4").read_bytes()[:300])
    wrong, to_do = refused("train", "tiny_wan_control", clips=folder)
    assert wrong.startswith("2 clip(s) cannot be used")
    assert f"style/a.mp4: its control {folder}/control/a.mp4 ends before it" in wrong
    assert f"style/b.mp4: its control {folder}/control/b.mp4: " in wrong
    assert "data.allow_drops=true" in to_do


def test_a_column_that_names_a_missing_control_video(refused, tmp_path):
    write_clips(tmp_path / "set")
    (tmp_path / "set" / "m.csv").write_text("video,caption,control\na.mp4,x,gone.mp4\n")
    wrong, _ = refused("check", "tiny_wan_control", clips=tmp_path / "set" / "m.csv")
    assert "line 2: missing file" in wrong
    assert "gone.mp4" in wrong


# Settings

@pytest.mark.parametrize("own", ["high.rank=8", "low.lr=1e-5", "high.num_steps=5"])
def test_settings_of_an_expert_for_a_single_transformer(refused, own):
    key, _, value = own.partition("=")
    wrong, to_do = refused("train", "tiny_wan", own)
    assert wrong == f"{key} = {float(value) if 'lr' in key else value} is not allowed: tiny_wan has one transformer"
    assert to_do.startswith("wantrain train recipe=")
    assert f" {key}=null    " in to_do
    assert own not in to_do


def test_one_expert_of_a_single_transformer(refused):
    wrong, to_do = refused("train", "tiny_wan_i2v", "model.experts=low")
    assert wrong == "model.experts = 'low' is not allowed: tiny_wan_i2v has one transformer"
    assert " model.experts=both" in to_do
    assert "experts=low" not in to_do


@pytest.mark.parametrize("share", ["1.5", "-0.1"])
def test_a_share_that_is_none(refused, share):
    wrong, to_do = refused("check", "tiny_wan_ti2v", f"data.first_frame_share={share}")
    assert wrong == f"data.first_frame_share = {share} is not allowed: a share in [0, 1]"
    assert "data.first_frame_share" in to_do


# What samples are made from

@pytest.fixture
def inputs(world):
    """inputs(name='file', ...) -> the override."""

    def made(**given: str) -> str:
        return "sampler.inputs=[{" + ", ".join(f"{name}: '{world / file}'" for name, file in given.items()) + "}]"

    return made


def test_an_input_that_nobody_knows(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan_i2v", inputs(start="image.png"))
    assert "sampler.inputs = " in wrong
    assert "is not allowed: first, last, control, control_mask, background, reference, face, camera, video" in wrong


@pytest.mark.parametrize(("name", "given", "allowed"), [
    ("tiny_wan", "control", "video"), ("tiny_wan", "first", "video"), ("tiny_wan_i2v", "last", "first, video"),
    ("tiny_wan_flf2v", "reference", "first, last, video"), ("tiny_wan_ti2v", "control", "first, video"),
    ("tiny_wan_control", "reference", "control, first, video"),
    ("tiny_wan_vace", "first", "control, control_mask, reference, video")])
def test_an_input_of_another_task(refused, inputs, name, given, allowed):
    wrong, _ = refused("sample", name, inputs(**{given: "image.png"}))
    assert wrong.startswith(f"sampler.inputs: {name} (")
    assert wrong.endswith(f"takes no {given}, but {allowed}")


def test_an_input_that_is_not_there(refused, inputs, world):
    wrong, to_do = refused("sample", "tiny_wan_i2v", inputs(first="gone.png"))
    assert wrong == f"sampler.inputs: first = {world / 'gone.png'} does not exist"
    assert to_do == "give the path of an image or video"
    assert "does not exist" in refused("sample", "tiny_wan_i2v", inputs(first="clips"))[0], "a folder is no image"


def test_a_damaged_input(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan_i2v", inputs(first="damaged.png"))
    assert "damaged.png" in wrong


def test_a_control_video_that_is_shorter_than_the_sample(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan_control", inputs(control="short.mp4"))
    assert "short.mp4: 3 frames at 16 fps from 0 s, but 5 are needed" in wrong


def test_as_many_inputs_as_prompts(refused, world):
    two = f"[{{first: '{world / 'image.png'}'}}, {{first: '{world / 'image.png'}'}}]"
    wrong, _ = refused("sample", "tiny_wan_i2v", f"sampler.inputs={two}", "sampler.prompts=[a, b, c]")
    assert wrong == "sampler.inputs = 2 is not allowed: one for all prompts, or one for each"


@pytest.mark.parametrize(("name", "example"), [
    ("tiny_wan_i2v", "first: IMAGE"), ("tiny_wan_flf2v", "first: IMAGE, last: IMAGE"),
    ("tiny_wan_control", "control: VIDEO"), ("tiny_wan_vace", "control: VIDEO")])
def test_nothing_to_sample_from(refused, name, example):
    wrong, to_do = refused("sample", name)
    assert "neither sampler.inputs nor data.heldout has any of 5f 32x48" in wrong
    assert to_do.endswith(f" 'sampler.inputs=[{{{example}}}]'")


# What a sample cannot be made from

def test_fun_control_sampled_without_a_control_video(refused, inputs):
    wrong, to_do = refused("sample", "tiny_wan_control", inputs(first="image.png"))
    assert "sampler.inputs" in wrong
    assert "control" in wrong
    assert to_do


@pytest.mark.parametrize("name", ["tiny_wan_control", "tiny_wan_vace"])
def test_an_image_in_place_of_a_control_video(refused, inputs, name):
    wrong, _ = refused("sample", name, inputs(control="image.png"))
    assert "image.png" in wrong


def test_a_reference_that_is_a_video(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan_vace", inputs(reference="film.mp4"))
    assert "film.mp4" in wrong


@pytest.mark.parametrize(("given", "lacks"), [("background", "control_mask"), ("control_mask", "background")])
def test_half_of_a_replacement(refused, inputs, given, lacks):
    rest = {"control": "film.mp4", "face": "film.mp4", "reference": "image.png"}
    wrong, to_do = refused("sample", "tiny_wan_animate", inputs(**rest, **{given: "film.mp4"}))
    assert f"takes {given} and {lacks} together, and there is no {lacks}" in wrong
    assert to_do == f"add {lacks}: VIDEO, or take {given} out"


def test_a_mask_of_no_control_video(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan_vace", inputs(control_mask="film.mp4"))
    assert "control" in wrong


def test_inputs_for_two_prompts_and_an_evaluation_of_another_number(refused, world):
    """The rule counts sampler.prompts; evaluate has prompts of its own."""
    two = f"[{{first: '{world / 'image.png'}'}}, {{first: '{world / 'image.png'}'}}]"
    wrong, _ = refused("evaluate", "tiny_wan_i2v", f"sampler.inputs={two}", "sampler.prompts=[a, b]",
                       f"data.heldout={world / 'clips'}")
    assert "sampler.inputs" in wrong


def test_an_image_to_start_a_video_from(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan", inputs(video="image.png"))
    assert "image.png" in wrong


def test_a_strength_that_leaves_no_step(refused, inputs):
    wrong, _ = refused("sample", "tiny_wan", inputs(video="film.mp4"), "sampler.num_steps=1", "sampler.strength=0.7")
    assert "sampler.strength" in wrong


def test_a_control_video_of_another_shape_than_its_clip(refused, tmp_path):
    """Both are cropped to the bucket, each on its own: 96x64 and 64x96 would show other places."""
    folder = with_partners(tmp_path / "set", control="+.mp4")
    pictures.write_mp4(folder / "control" / "a.mp4", moving_square(3, NUM_FRAMES, 96, 64), 16)
    wrong, _ = refused("check", "tiny_wan_control", clips=folder)
    assert "style/a.mp4: its control" in wrong
