"""What a verb cannot end is said before its first heavy step, and `check` says it too."""

from __future__ import annotations

import pytest

from wantrain.models.base import Base


@pytest.fixture
def light(monkeypatch):
    """Whatever loads weights fails."""
    for part in ("transformer", "vae", "text"):
        monkeypatch.setattr(Base, part, None)


@pytest.mark.parametrize("verb", ["check", "train"])
def test_no_validation_sigma_in_the_trained_range(wantrain, light, capsys, verb):
    asked = ("validation.every_steps=2", "sigma.range=[0.4,0.6]", "validation.sigmas=[0.1,0.9]")
    assert wantrain(verb, *asked) == 2
    assert "validation.sigmas = [0.1, 0.9]: none is in [0.4, 0.6)" in capsys.readouterr().err
    if verb == "check":
        assert wantrain(verb, *asked, "validation.sigmas=[0.1,0.5]") == 0


@pytest.mark.parametrize(("override", "said"), [
    ("data.trigger=nosuchword", "no training caption holds the trigger 'nosuchword'"),
    ("data.trigger=''", "evaluate needs data.trigger"),
    ("evaluate.prompts=[]", "evaluate needs evaluate.prompts"),
    ("data.heldout=null", "evaluate needs data.heldout"),
])
def test_what_evaluate_lacks_is_told_by_check_and_before_anything_is_loaded(wantrain, light, capsys, override, said):
    assert wantrain("evaluate", override) == 2
    assert said in capsys.readouterr().err
    assert wantrain("check", override) == 0
    assert f"evaluate     not yet: {said}" in capsys.readouterr().out


def test_evaluate_without_a_cache_or_a_lora_says_so_before_anything_is_loaded(wantrain, light, capsys, tmp_path):
    assert wantrain("evaluate", f"data.cache_dir={tmp_path / 'empty'}") == 2
    assert "the cache lacks" in capsys.readouterr().err
    assert wantrain("evaluate") == 2
    assert "no LoRA file" in capsys.readouterr().err
