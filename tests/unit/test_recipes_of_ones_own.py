"""Recipes of a user's own: recipes/ of the working folder, WANTRAIN_RECIPES, and a file."""

import pytest

from wantrain import config
from wantrain.terms import UserError

MINE = "# @package _global_\ndefaults: [demo_anime, _self_]\nrun: {name: mine}\noptim: {lr: 5e-5}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANTRAIN_RECIPES", raising=False)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(MINE)
    return tmp_path


@pytest.mark.parametrize("words", [["recipe=mine"], ["mine"], ["recipes/mine.yaml"], ["recipe=recipes/mine.yaml"]])
def test_a_recipe_of_the_working_folder_has_a_name_and_a_path(words):
    made = config.load([*words, "train.num_steps=7"])
    assert (made.run.name, made.optim.lr, made.train.num_steps) == ("mine", 5e-5, 7)
    assert made.data.trigger == "celanime style"


def test_recipes_build_on_each_other_wherever_they_are(folder, monkeypatch):
    far = folder / "far, 'away' [1]"
    far.mkdir()
    (far / "more.yaml").write_text("# @package _global_\ndefaults: [mine, _self_]\nrun: {name: more}\n")
    monkeypatch.setenv("WANTRAIN_RECIPES", str(far))
    assert config.load(["more"]).optim.lr == 5e-5
    monkeypatch.delenv("WANTRAIN_RECIPES")
    assert config.load([str(far / "more.yaml")]).run.name == "more"
    with pytest.raises(UserError, match="recipe = 'more' is not there"):
        config.load(["recipe=more"])


def test_faults_in_them_have_a_file_and_a_line(folder):
    (folder / "recipes" / "mine.yaml").write_text(MINE + "trian: {num_steps: 3}\n")
    with pytest.raises(UserError, match=r"recipes/mine\.yaml:5: unknown config key trian"):
        config.load(["mine"])


def test_a_name_that_two_recipes_have_is_refused(folder):
    (folder / "recipes" / "demo_anime.yaml").write_text(MINE)
    for words in (["demo_anime"], ["recipe=recipes/demo_anime.yaml"]):
        with pytest.raises(UserError, match=r"'demo_anime' is the name of recipes/demo_anime\.yaml and of ") as caught:
            config.load(words)
        assert "mv recipes/demo_anime.yaml recipes/my_demo_anime.yaml" in str(caught.value)
    assert config.load([str(config.configs_folder() / "recipe" / "demo_footage.yaml")]).run.name == "demo_footage"


def test_a_folder_of_the_variable_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("WANTRAIN_RECIPES", "nowhere")
    with pytest.raises(UserError, match="WANTRAIN_RECIPES names the folder nowhere"):
        config.load(["mine"])
