"""`wantrain new`: what it holds out, what it chooses, and the recipe that it writes."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import opened, write_clips
from wantrain import cli, config, costs
from wantrain.data.apart import hold_out
from wantrain.models.variants import VARIANTS
from wantrain.recipe import draft
from wantrain.recipe.costing import Room, job_of, policy_of
from wantrain.terms import Bucket, Clip, MediaInfo, UserError


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve clips of 9 frames at 16 fps, and two plain ones."""
    folder = tmp_path_factory.mktemp("twelve")
    write_clips(folder / "clips", 12, "a square that moves, number {}")
    write_clips(folder / "plain", 2, "a plain square, number {}", 50)
    return folder


@pytest.fixture
def here(twelve, tmp_path, monkeypatch):
    for name in ("clips", "plain"):
        shutil.copytree(twelve / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_recipe_for_twelve_clips_is_whole_and_can_be_checked(here, capsys):
    asked = ["new", "sq", "--model", "tiny_wan", "--clips", "clips", "--plain", "plain", "--trigger", "sqstyle"]
    before = {path: path.read_bytes() for path in here.glob("*/*")}
    assert cli.main(asked) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10
    assert said[-1] == "next: wantrain run sq"
    assert {path: path.read_bytes() for path in before} == before
    train, heldout = (rows(here / "recipes" / f"sq.{what}.jsonl") for what in ("train", "heldout"))
    assert len(train) + len(heldout) == 12
    assert len(heldout) == 1
    assert not {row["video"] for row in train} & {row["video"] for row in heldout}
    assert all(row["caption"].startswith("sqstyle, a square") for row in train + heldout)
    recipe, clips = opened(["recipe=sq"])
    made = recipe.config
    assert len(clips.planned) == 13
    assert {str(p.bucket) for p in clips.everything} == {"9f 64x96"}
    assert {p.clip.repeats for p in clips.planned if p.clip.source == "plain"} == {(1 / 2) * (2 * 13 / 3) / 2}
    assert sum("sqstyle" in prompt for prompt in made.sampler.prompts) == len(made.sampler.prompts) - 1 == 2
    assert not any("sqstyle" in prompt for prompt in made.evaluate.prompts)
    assert made.sampler.prompts[0] == heldout[0]["caption"]
    assert len((here / "recipes" / "sq.yaml").read_text().splitlines()) < 45
    assert cli.main(asked) == 2
    assert "recipes/sq.yaml is there, and is not overwritten" in capsys.readouterr().err


def test_what_is_not_given_is_an_error_without_a_terminal(here, capsys):
    for given, option in ((["--clips", "clips"], "--model"), (["--model", "tiny_wan"], "--clips"),
                          (["--model", "tiny_wan", "--clips", "clips"], "--trigger")):
        assert cli.main(["new", "sq", *given]) == 2
        told = capsys.readouterr().err
        assert f"{option} is not given, and there is no terminal to ask at" in told
    assert cli.main(["new", "demo_anime", "--yes"]) == 2
    assert "ships with wantrain" in capsys.readouterr().err
    assert cli.main(["new", "a/b", "--yes"]) == 2
    assert not list(here.glob("recipes/*"))
    assert cli.main(["new", "sq", "--model", "tiny_wan", "--clips", "clips", "--yes"]) == 0
    assert config.load(["sq"]).data.trigger == "a square that moves"


@pytest.mark.slow
def test_at_a_terminal_it_asks(here):
    ours, theirs = pty.openpty()
    asking = subprocess.Popen([sys.executable, "-m", "wantrain", "new", "sq"], stdin=theirs, stdout=theirs,
                              stderr=subprocess.STDOUT, cwd=here)
    os.write(ours, b"tiny_wan\nclips\nsqstyle\nplain\n")
    assert asking.wait(120) == 0
    os.close(theirs)
    assert config.load(["sq"]).data.trigger == "sqstyle"
    assert set(config.load(["sq"]).data.sources) == {"clips", "plain"}


def clip(name, file="film.mp4"):
    return Clip(f"clips/{name}", file, "a caption", "clips")


def found_of(clips):
    return {one.path: MediaInfo(digest=f"bytes of {one.path}") for one in clips}


def test_a_film_is_held_out_whole_and_else_a_shot():
    films = [clip(f"{film}.mp4@{shot}.000#{part}", f"{film}.mp4") for film, shots in (("a", 6), ("b", 5), ("c", 1))
             for shot in range(shots) for part in range(2)]
    held, whole = hold_out(films, found_of(films), 0.1)
    assert whole == "film"
    assert {one.path for one in held} == {"c.mp4"}
    one_film = [one for one in films if one.path == "a.mp4"]
    held, whole = hold_out(one_film, found_of(films), 0.1)
    assert whole == "shot"
    assert len(held) == 2
    assert len({one.id.partition("#")[0] for one in held}) == 1
    assert hold_out(one_film[:2], found_of(films), 0.1) == ([], "")


def test_copies_of_a_file_and_scenes_of_a_film_stay_together():
    copies = [clip(f"{i}.mp4", f"{i}.mp4") for i in range(6)]
    found = {one.path: MediaInfo(digest=str(i % 3)) for i, one in enumerate(copies)}
    held, _ = hold_out(copies, found, 0.4)
    assert sorted(found[one.path].digest for one in held) == [found[held[0].path].digest] * 2
    scenes = [clip(f"{film}-Scene-{i:03d}.mp4", f"{film}{i}.mp4") for film, number in (("x", 9), ("y", 1))
              for i in range(number)]
    held, whole = hold_out(scenes, found_of(scenes), 0.1)
    assert ([one.id for one in held], whole) == (["clips/y-Scene-000.mp4"], "film")


def test_lengths_leave_no_clip_out_and_follow_none_that_is_rare():
    assert draft.lengths_for([80, 81, 90, 40], 81) == [33, 49, 81]
    assert draft.lengths_for([100] * 20 + [35], 81) == [33, 81]
    assert draft.lengths_for([35] * 20 + [100], 81) == [33]
    assert draft.lengths_for([3, 400], 81) == [1, 81]
    assert draft.lengths_for([200] * 3, 121) == [121]


def test_sizes_are_those_of_the_clips_and_never_larger():
    a14b, tiny = VARIANTS["wan22_t2v_a14b"], VARIANTS["tiny_wan"]
    assert draft.sizes_for([(1080, 1920)] * 9 + [(1920, 1080)] * 3, a14b) == [(480, 832), (832, 480)]
    assert draft.sizes_for([(1080, 1920)] * 99 + [(1920, 1080)], a14b) == [(480, 832)]
    (height, width), = draft.sizes_for([(300, 400)], a14b)
    assert height % 16 == width % 16 == 0
    assert height * width <= 300 * 400
    assert abs(width / height - 4 / 3) < 0.1
    assert draft.sizes_for([(128, 192)], tiny) == [(64, 96)]
    assert draft.sizes_for([(1080, 1920)], VARIANTS["wan22_ti2v_5b"]) == [(704, 1280)]


def test_a_card_that_is_small_gets_a_base_in_int8_and_smaller_clips():
    a14b = VARIANTS["wan22_t2v_a14b"]
    native = a14b.native_tokens
    assert draft.form_for(a14b, 80, native) == ("dtype", False, draft.tokens_that_fit(a14b, 80, "dtype"))
    assert draft.form_for(a14b, 40, native)[:2] == ("int8", False)
    assert draft.form_for(a14b, 24, native)[:2] == ("int8", True)
    assert draft.form_for(a14b, 24, 1560)[:2] == ("int8", False), "a still needs no block to wait"
    form, waits, room = draft.form_for(a14b, 8, native)
    assert (form, waits) == ("int8", True)
    assert 1560 < room < native
    assert draft.tokens_that_fit(a14b, 24, "int8") < draft.tokens_that_fit(a14b, 32, "int8")
    with pytest.raises(UserError, match="does not train on a card of 2 GiB"):
        draft.form_for(a14b, 2, native)


def test_what_new_says_that_a_card_holds_is_what_training_chooses():
    """With the memory that `new` leaves open, the training's own choice fits the card, by moving what it must."""
    a14b = VARIANTS["wan22_t2v_a14b"]
    made = config.load(["anime_a14b", "memory.base=int8", "data.num_frames=[81]", "data.resolutions=[[480,832]]",
                        "data.max_tokens_per_clip=null", "train.micro_batch_size=1"])
    job = job_of(config.expert_config(made, "high"), Bucket(81, 480, 832), 1)
    policy = policy_of(made, job, Room(costs.card_of("24gb"), 24 * costs.GIB))
    assert costs.peak(costs.device_parts(job, policy)) <= 24 * costs.GIB
    assert policy.swap or policy.offload
    assert draft.form_for(a14b, 24, a14b.native_tokens)[1]


def test_the_memory_of_a_recipe_is_in_it(here):
    assert cli.main(["new", "big", "--model", "wan22_t2v_a14b", "--clips", "clips", "--trigger", "sqstyle", "--gpu",
                     "24gb"]) == 0
    text = yaml.safe_load((here / "recipes" / "big.yaml").read_text())
    made = config.load(["big"])
    assert made.memory.base.name == ("int8" if "memory" in text else "dtype")
    assert made.data.resolutions == [[64, 96]], "no larger than the clips"
