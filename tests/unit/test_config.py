"""Hydra composition: every file composes, and every mistake is named."""

import subprocess
import sys
from enum import Enum

import pytest
import yaml

from wantrain import config
from wantrain.terms import UserError

RECIPES = ["anime_1b3", "anime_a14b", "architecture_1b3", "between_flf2v_14b", "character_1b3", "control_fun_1b3",
           "control_vace_1b3", "demo_anime", "demo_architecture", "demo_footage", "motion_i2v_14b", "motion_i2v_a14b",
           "motion_ti2v_5b"]


def test_every_yaml_composes():
    folder = config.configs_folder()
    assert config.recipes() == RECIPES
    for recipe in RECIPES:
        assert config.load([f"recipe={recipe}"]).run.name == recipe
    groups = [p for p in folder.glob("*/*.yaml") if p.parent.name != "recipe"]
    assert len(groups) == 35
    for path in groups:
        composed = config.load(["recipe=demo_anime", f"{path.parent.name}={path.stem}"])
        part = vars_of(composed)[path.parent.name]
        recipe = yaml.safe_load((folder / "recipe" / "demo_anime.yaml").read_text()).get(path.parent.name, {})
        for key, value in yaml.safe_load(path.read_text()).items():
            assert plain(getattr(part, key)) == plain(recipe.get(key, value)), (path, key)
    assert len(list(folder.rglob("*.yaml"))) == len(RECIPES) + len(groups) + 1


def vars_of(composed):
    return {name: getattr(composed, name) for name in config.Config.__slots__}


def plain(value):
    return value.name if isinstance(value, Enum) else value


@pytest.mark.parametrize(("override", "said"), [
    ("train.lrr=1", "lrr"),
    ("+train.stray=1", "train.stray"),
    ("+stray=1", "stray"),
    ("+data.sources.style.colour=1", "colour"),
    ("train.num_steps=many", "many"),
    ("train.num_steps=0", "train.num_steps"),
    ("data.num_frames=[8]", "4n+1"),
    ("data.mode=teleport", "teleport"),
    ("model=wan99", "wan99"),
    ("recipe=nothing", "nothing"),
    ("optim.betas=[0.9]", "optim.betas"),
    ("data.batch_size=3", "multiple of train.micro_batch_size"),
    ("data.resolutions=[[64]]", "resolution"),
    ("tracker.names=[mlflow]", "mlflow"),
    ("lora.alpha=-1", "lora.alpha"),
])
def test_a_mistake_names_its_key_or_value(override, said):
    with pytest.raises(UserError, match=said.replace("+", r"\+")) as caught:
        config.load(["recipe=demo_anime", override])
    assert caught.value.next_step


def test_dictionaries_of_the_users_own_keys():
    composed = config.load(["recipe=demo_anime", "model.parts.vae=/x", "lora.rank_pattern={attn: 2}",
                            "lora.alpha_pattern.attn_ffn=3"])
    assert (composed.model.parts, composed.lora.rank_pattern, composed.lora.alpha_pattern) == (
        {"vae": "/x"}, {"attn": 2}, {"attn_ffn": 3.0})
    for wrong in ("lora.rank_pattern={attn: much}", "lora.rank_pattern={attn: 0}"):
        with pytest.raises(UserError, match="rank_pattern"):
            config.load(["recipe=demo_anime", wrong])


def test_a_mistyped_key_gets_a_suggestion():
    with pytest.raises(UserError, match=r"did you mean optim\.warmup_steps\?"):
        config.load(["recipe=demo_anime", "optim.warmup_step=1"])


def test_no_recipe_lists_the_recipes():
    with pytest.raises(UserError, match="demo_anime"):
        config.load([])


def test_a_users_own_recipe_is_found(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo_anime\n  - _self_\nrun: {name: mine}\ntrain: {num_steps: 7}\n")
    composed = config.load(["recipe=mine"], tmp_path)
    assert (composed.run.name, composed.run.dir, composed.train.num_steps) == ("mine", "runs/mine", 7)


def test_what_a_section_says_of_itself_is_no_key():
    for key in ("run.may_change", "train.may_change", "memory.may_change"):
        with pytest.raises(UserError, match=f"unknown config key {key}"):
            config.load(["recipe=demo_anime", f"{key}=[a]"])


def test_every_key_has_a_sentence_in_help():
    described = config.described()
    assert len(described) == 125
    assert [key for key, (_, sentence) in described.items() if not sentence.endswith(".")] == []


def test_help_needs_no_heavy_library():
    code = "import sys, wantrain.cli as c; c.main(['--help']); print(sorted({'diffusers', 'peft'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "evaluate" in shown
    assert shown.splitlines()[-1] == "[]"


def test_fingerprint_holds_what_changes_the_numbers_only():
    def keys(*overrides):
        return config.resume_keys(config.load(["recipe=demo_anime", *overrides]))

    assert keys() == keys("train.num_steps=9", "train.micro_batch_size=1", "data.mode=stream", "run.dir=x")
    for changed in ("lora.rank=3", "train.seed=1", "optim.lr=1", "data.caption_dropout=0.5", "data.batch_size=16"):
        assert keys() != keys(changed), changed
    assert keys("optim.schedule=cosine") != keys("optim.schedule=cosine", "train.num_steps=9")
