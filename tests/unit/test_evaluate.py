"""What `wantrain evaluate` leaves: columns, prompts of three kinds, metrics, and what a second time makes again."""

import json

import pytest
import torch

from tests.conftest import opened
from wantrain import pictures, results, style
from wantrain.recipe import judged, sampler
from wantrain.recipe.draft import evaluation_prompts
from wantrain.results import KINDS

COMPARED = ["evaluate.seeds=[0,1]", "train.save_every=2", "train.keep_checkpoints=3", "sampler.compare=[all]",
            "sampler.strengths=[0,0.5,1]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, clips, cache_dir):
    """A run of four steps with two checkpoints, evaluated at two strengths and two seeds."""
    from tests.conftest import arguments_for
    from wantrain import cli

    folder = tmp_path_factory.mktemp("evaluated") / "run"
    own = [*arguments_for(clips, cache_dir, folder), *COMPARED]
    for verb in ("cache", "train", "export", "evaluate"):
        assert cli.main([verb, *own]) == 0
    return folder, own


def test_columns_are_base_strengths_checkpoints_and_one_without_trigger(run):
    found = results.read(run[0] / "report")
    columns = {column.id: column for column in found.columns}
    assert list(columns) == ["base", "strength_0.5", "strength_1", "strength_1_no_trigger", "step_000002_strength_0.5",
                             "step_000002_strength_1"]
    assert [column.step for column in columns.values()] == [None, 4, 4, 4, 2, 2]
    assert [column.trigger for column in columns.values()] == [False, True, True, False, True, True]
    assert columns["step_000002_strength_1"].lora.endswith("loras/demo_anime_step_000002.safetensors")
    captions = {video.column: video.caption for video in found.videos}
    assert captions["base"] == captions["strength_1_no_trigger"] == "a square"
    assert captions["strength_1"] == captions["step_000002_strength_1"] == "sqstyle, a square"
    assert len(found.videos) == 6 * 2
    frames = {video.column: pictures.read_mp4(run[0] / "report" / video.file) for video in found.videos}
    assert len({one.numpy().tobytes() for one in frames.values()}) == 6, "each column is another video"


def test_metrics_are_those_of_the_videos_and_of_held_out_clips(run):
    found = results.read(run[0] / "report")
    metrics = {metric.name: metric for metric in found.metrics}
    _, clips = opened(run[1])
    losses, gains = metrics["heldout_loss"].columns, metrics["heldout_minus_base"].columns
    assert set(losses) == {column.id for column in found.columns if column.id != "strength_1_no_trigger"}
    for column, (gain, half) in gains.items():
        assert gain == pytest.approx(losses[column][0] - losses["base"][0], abs=1e-6)
        assert half > 0
    by_sigma = found.provenance["held-out loss by sigma"]
    assert list(by_sigma)[4] == "0.7500"  # half of the schedule at shift 3: 3 * 0.5 / (1 + 2 * 0.5)
    assert sum(one["base"] for one in by_sigma.values()) / 9 == pytest.approx(losses["base"][0], rel=1e-5)
    last = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    wanted = style.describe([judged.decode.read_window(p) for p in clips.planned if "sqstyle" in p.clip.caption])
    videos = [pictures.read_mp4(run[0] / "report" / v.file) for v in found.videos if v.column == "base"]
    assert metrics["style"].columns["base"][0] == pytest.approx(style.distance(style.describe(videos), wanted)["style"])
    assert 0 < metrics["style"].reference < 1
    near, far = (style.distance(style.describe([pictures.read_mp4(run[0] / "report" / v.file) for v in found.videos
                                                if v.column == name]), style.describe(videos))["style"]
                 for name in ("strength_1_no_trigger", "strength_1"))
    assert metrics["selectivity"].columns == {"strength_1": [pytest.approx(1 - near / far), None]}
    assert metrics["diversity"].columns["base"][0] > 0
    assert all(metric.tells.endswith(".") for metric in found.metrics)
    first = found.videos[0]
    assert first.metrics["memorised"] <= 1
    assert first.command.startswith("wantrain sample --like ")


def test_a_second_time_nothing_is_sampled_and_the_numbers_are_the_same(run, monkeypatch, capsys):
    from wantrain import cli

    before = results.read(run[0] / "report")
    monkeypatch.setattr(sampler.sampling, "sample", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr(sampler.Recipe, "load_text", lambda *_: pytest.fail("the text encoder is loaded"))
    capsys.readouterr()
    assert cli.main(["evaluate", *run[1]]) == 0
    assert "12 of 12 videos" in capsys.readouterr().out
    assert results.read(run[0] / "report") == before


def test_what_has_changed_is_made_again_and_nothing_else(run, monkeypatch):
    from wantrain import cli

    made = []
    sample = sampler.sampling.sample
    monkeypatch.setattr(sampler.sampling, "sample", lambda pipeline, text, seed, *rest: (
        made.append((text, seed)), sample(pipeline, text, seed, *rest))[1])
    video = run[0] / "report" / "001_strength_1.mp4"
    video.write_bytes(video.read_bytes()[:-200])
    assert cli.main(["evaluate", *run[1]]) == 0
    assert made == [("sqstyle, a square", 1)]
    made.clear()
    assert cli.main(["evaluate", *run[1], "evaluate.unrelated=[a circle]", "evaluate.seeds=[0]",
                     "sampler.compare=[]", "sampler.strengths=[1]"]) == 0
    assert made == [("a circle", 0), ("sqstyle, a circle", 0), ("a circle", 0)]
    found = results.read(run[0] / "report")
    assert [prompt.kind for prompt in found.prompts] == [KINDS[0], KINDS[2]]
    assert "diversity" not in [metric.name for metric in found.metrics]


def test_a_checkpoints_lora_is_what_the_checkpoint_holds(run):
    """The newest one's is the export to the byte."""
    from wantrain.config import load
    from wantrain.recipe.exporting import checkpoint_lora

    exported = run[0] / "export" / "demo_anime.safetensors"
    assert checkpoint_lora(load(run[1]), None, 4).read_bytes() == exported.read_bytes()
    assert checkpoint_lora(load(run[1]), None, 2).read_bytes() != exported.read_bytes()


def test_every_video_of_an_evaluation_can_be_made_again(run, capsys):
    from wantrain import cli

    for name in ("000_step_000002_strength_0.5", "001_base"):
        assert cli.main(["sample", "--like", str(run[0] / "report" / f"{name}.mp4")]) == 0
        assert "the same frames as" in capsys.readouterr().out


def test_prompts_of_three_kinds_by_default(arguments):
    names = [f"~evaluate.{key}" for key in ("prompts", "combined", "unrelated")]
    plain = [word for word in arguments if not word.startswith("evaluate.")] + [name.replace("~", "") + "=null"
                                                                                for name in names]
    _, clips = opened(plain)
    prompts = evaluation_prompts(clips)
    assert [prompt.kind for prompt in prompts] == [KINDS[0]] * 2 + [KINDS[1]] * 2 + [KINDS[2]]
    assert [prompt.text for prompt in prompts[:2]] == ["unseen square 0", "unseen square 1"]
    assert not any("sqstyle" in prompt.text for prompt in prompts)


def test_a_column_that_is_the_base_itself_gains_nothing():
    losses = dict.fromkeys(("base", "same"), torch.rand(3, 9, generator=torch.Generator().manual_seed(0)))
    metrics = {metric.name: metric.columns for metric in judged.loss_metrics(losses)}
    assert metrics["heldout_minus_base"] == {"same": (0.0, 0.0)}
    assert metrics["heldout_loss"]["same"] == metrics["heldout_loss"]["base"]
    assert judged.loss_metrics({}) == []


