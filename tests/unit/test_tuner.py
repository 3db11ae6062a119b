"""What `wantrain tune` searches, keeps and says: pure functions, and faults before anything heavy begins."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import opened
from wantrain import config as schema
from wantrain.engine.stopping import Stopper
from wantrain.recipe.heldout import max_rows
from wantrain.terms import Interrupted, UserError
from wantrain.tuner import search, settings, told
from wantrain.tuner.search import Round, Speed
from wantrain.tuner.trainings import Arm, Outcome, Planned, Trainings, share_base, stopping_at, take_place
from wantrain.tuner.tune import open_arms
from wantrain.validation import Interval


def test_over_is_read_by_key_and_brackets_keep_their_commas():
    assert settings.read_over(["lora.rank=8,16", "lora.targets=[attn],[attn,ffn]", "data.sources.a.path=x=y"]) == {
        "lora.rank": ["8", "16"], "lora.targets": ["[attn]", "[attn,ffn]"], "data.sources.a.path": ["x=y"]}


@pytest.mark.parametrize("words", [["optim.lr"], ["optim.lr="], ["optim.lr=1,,2"], ["optim.lr=1", "optim.lr=2"]])
def test_over_refuses_what_names_no_values(words):
    with pytest.raises(UserError, match=r"--over optim\.lr"):
        settings.read_over(words)


def test_the_product_has_every_combination_once():
    assert settings.product({"a": ["1", "2"], "b": ["x", "y"]}) == {
        "a=1 b=x": ("a=1", "b=x"), "a=1 b=y": ("a=1", "b=y"), "a=2 b=x": ("a=2", "b=x"), "a=2 b=y": ("a=2", "b=y")}


def test_halving_keeps_half_for_twice_as_long_and_ends_with_all_steps_and_seeds():
    assert search.rounds(12, 400, 3, 0) == [Round(12, 400, 3)]
    assert search.rounds(12, 400, 3, 2) == [Round(12, 100, 1), Round(6, 200, 1), Round(3, 400, 3)]
    assert search.rounds(5, 100, 2, 1) == [Round(5, 50, 1), Round(3, 100, 2)]


def test_seconds_count_the_default_in_the_last_round_and_what_runs_side_by_side():
    plan = [Round(6, 50, 1), Round(3, 100, 2)]
    assert Speed(10, 1, 1).seconds(plan) == 6 * 60 + 8 * 110
    assert Speed(10, 1, 4).seconds(plan) == 2 * 60 + 2 * 110


def test_a_search_takes_the_product_where_the_budget_holds_it_else_as_few_halvings_as_do():
    speed = Speed(0, 1, 1)
    costs = [speed.seconds(search.rounds(8, 160, 3, halvings)) for halvings in range(4)]
    assert costs == sorted(costs, reverse=True)
    for halvings, cost in enumerate(costs):
        assert search.fitting(8, 160, 3, speed, cost + 1) == search.rounds(8, 160, 3, halvings)
    with pytest.raises(UserError, match=r"the shortest takes about 24\.0"):
        search.fitting(8, 160, 3, speed, costs[-1] - 1)


def test_no_round_is_too_short_to_order_learning_rates():
    with pytest.raises(UserError, match="hold no search of 8 settings, 30 steps"):
        search.fitting(8, 30, 3, Speed(0, 1, 1), 9 * 30 * 3 - 1)


def test_clips_to_learn_are_those_with_the_trigger():
    captions = {"a": "sq style, a house", "b": "a house"}
    assert search.scored(captions, "sq style") == (["a"], ["b"])
    assert search.scored(captions, "") == search.scored(captions, "none has it") == (["a", "b"], [])


def test_a_change_is_paired_by_seed_and_clip():
    """Clips and seeds differ a thousand times as much as the change, which is the same everywhere."""
    before = {seed: {"a": 1.0 + 50 * seed, "b": 100.0 - seed} for seed in (0, 1, 2)}
    now = {seed: {name: loss - 0.1 for name, loss in losses.items()} for seed, losses in before.items() if seed < 2}
    found = search.change(now, before, ["a", "b"])
    assert found.mean == pytest.approx(-0.1)
    assert found.half < 1e-9
    assert search.change(now, before, ["b"]).mean == pytest.approx(-0.1)


def outcomes(*losses):
    return {seed: Outcome({"a": loss, "b": loss + 0.2}, {"a": 1.0, "b": 1.0}, step_s=2.0)
            for seed, loss in enumerate(losses)}


def test_a_row_compares_with_the_default_and_the_base():
    row = told.row_of("x", outcomes(0.5, 0.7), outcomes(0.6, 0.8), (["a"], ["b"]))
    assert row.seeds == [0, 1]
    assert row.loss == pytest.approx(0.6)
    assert (row.change.mean, row.gain.mean, row.plain.mean) == pytest.approx((-0.1, -0.4, -0.2))
    assert told.row_of("x", {0: Outcome(fault="out of memory")}, None, (["a"], [])).fault == "out of memory"


def test_a_seed_that_failed_is_left_out_of_the_comparison_and_a_failed_arm_stands_last():
    found = outcomes(0.5, 9.0) | {1: Outcome(fault="stopped")}
    row = told.row_of("x", found, outcomes(0.6, 0.8), (["a"], []))
    assert row.seeds == [0]
    assert row.change.mean == pytest.approx(-0.1)
    lines = told.table([told.Row("failed", [], fault="no memory"), row]).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["x", "failed"]
    assert lines[2].endswith("no memory")


def test_the_page_says_what_the_table_says_and_opens_alone():
    page = told.page("a < b", [told.Row("lr=1", [0], 0.5, Interval(-0.1, 0.02), step_s=1.0)], ["one & two"], "again")
    assert all(text in page for text in ("a &lt; b", "-0.1000 +-0.0200", "one &amp; two"))
    assert not any(text in page for text in ("http", "src="))


def test_the_written_recipe_composes_to_the_config_that_won(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=demo_anime", "data.batch_size=4", "train.micro_batch_size=4", "lora.rank=8", "lora.alpha=8",
             "lora.rank_pattern={attn: 4}", "~data.sources.regularisation", "optim.lr=3e-3"]
    plain, won = schema.load(words[:1]), schema.load(words)
    text = told.recipe_text("best", "demo_anime", (plain, won), words, ["why"])
    Path("recipes").mkdir()
    Path("recipes/best.yaml").write_text(text)
    again = schema.load(["recipe=best", "~data.sources.regularisation"])
    assert {key: value for key, value in schema.flat(again).items() if not key.startswith("run.")} == {
        key: value for key, value in schema.flat(won).items() if not key.startswith("run.")}
    assert again.run.name == "best"
    assert "wantrain run best '~data.sources.regularisation'" in text
    assert set(yaml.safe_load(text)) == {"defaults", "run", "data", "train", "lora", "optim"}


def test_processes_take_different_places(tmp_path, monkeypatch):
    """A place is held by a lock, so a test in one process sees but the first; the second is held from without."""
    monkeypatch.setattr("wantrain.tuner.trainings._places", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    holding = ("import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
               "print('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", holding, str(tmp_path / "0")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert take_place(tmp_path, 2) == 1
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        assert take_place(tmp_path, 2) == 1
        other.stdin.close()


def test_a_training_is_asked_to_stop_where_the_budget_ends():
    """Before it steps it is simply left; then Stopper hears the same signal, and it saves."""
    with pytest.raises(Interrupted), stopping_at(time.time() - 1):
        pytest.fail("it began")
    with pytest.raises(Interrupted), stopping_at(time.time() + 0.05):
        time.sleep(20)
    before = signal.getsignal(signal.SIGTERM)
    with stopping_at(time.time() + 0.05), Stopper() as stopper:
        until = time.monotonic() + 20
        while not stopper.asked and time.monotonic() < until:
            time.sleep(0.01)
        assert stopper.asked
    with stopping_at(time.time() + 0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_base_is_laid_where_a_training_has_not_measured_it(tmp_path):
    config = schema.load(["recipe=demo_anime", f"run.dir={tmp_path / 'own'}"])
    opening = tmp_path / "opening"
    opening.mkdir()
    (opening / "validation.json").write_text('{"key": "k", "base": {"heldout": [1.0]}, "steps": {"5": {}}}')
    share_base(config, opening)
    own = tmp_path / "own" / "validation.json"
    assert '"steps": {}' in own.read_text()
    own.write_text("mine")
    share_base(config, opening)
    assert own.read_text() == "mine"


def test_a_training_is_remembered_by_all_that_fixes_its_numbers_and_nothing_else(arguments, cached, tmp_path):
    def key(*words, steps=4, seed=0):
        recipe, clips = opened([*arguments, *words])
        return Trainings({"x": Arm(recipe, clips)}, tmp_path, (), math.inf, 1).key(Planned("x", steps, seed))

    assert key() == key("run.name=other", "sampler.num_steps=3", "train.save_every=7")
    others = [key(), key("optim.lr=1e-3"), key(steps=5), key(seed=1), key("data.sources.style.repeats=2")]
    assert len(set(others)) == len(others)


def test_every_training_of_a_search_is_measured_by_the_same_rows(arguments, cached, tmp_path):
    recipe, clips = opened(arguments)
    trainings = Trainings({"x": Arm(recipe, clips)}, tmp_path, (), math.inf, 1)
    assert {max_rows(trainings.config(Planned("x", steps, 0))) for steps in (5, 20, 300)} == {2 * 9}
    more, _ = opened([*arguments, "data.batch_size=8"])
    assert max_rows(Trainings({"x": Arm(more, clips)}, tmp_path, (), math.inf, 1).config(Planned("x", 7, 0))) == 2 * 9


@pytest.mark.parametrize(("words", "said"), [
    (["--over", "optim.lr=1e-3"], "nothing to compare"),
    (["--over", "train.num_steps=5,6"], "--over train.num_steps is not allowed"),
    (["--over", "data.heldout=a,b"], "--over data.heldout is not allowed"),
    (["--over", "sigma.range=[0,0.5]"], "measured at other sigmas or sizes"),
    (["--over", "lora.rnk=8,16"], "rnk"),
    (["--over", "lora.rank=8,x"], "lora.rank"),
    (["--over", "optim.lr=1,2", "--seeds", "0"], "--seeds 0 is not allowed"),
    (["--over", "optim.lr=1,2", "data.heldout=null"], "data.heldout is not set"),
    (["--over", "optim.lr=1,2", "data.mode=stream"], "data.mode = stream"),
    ([], "--over is not given"),
])
def test_faults_are_told_before_anything_heavy_begins(wantrain, words, said, capsys, monkeypatch):
    monkeypatch.setattr("wantrain.tuner.tune.searched", lambda *_: pytest.fail("it began"))
    assert wantrain("tune", "optim.lr=1e-3", *words) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_that_is_there_is_not_overwritten(wantrain, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/demo_anime_tuned.yaml").write_text("# mine\n")
    assert wantrain("tune", "--over", "optim.lr=1e-3,2e-3") == 2
    assert "is not overwritten" in capsys.readouterr().err


def test_alpha_keeps_its_share_of_the_rank(arguments, cached):
    words = [*arguments, "lora.alpha=8"]
    arms = open_arms(settings.configs_of(schema.load(words), ["lora.rank=2,4,8"], words, None), words)
    assert {name: arm.recipe.config.lora.alpha for name, arm in arms.items()} == {
        "default": 8, "lora.rank=2": 4, "lora.rank=8": 16}
