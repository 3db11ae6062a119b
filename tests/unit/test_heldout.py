"""What a training measures of itself: against the frozen base and its best, by sigma, the same after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import opened
from wantrain import flow, lora, validation
from wantrain.config import load
from wantrain.models.encode import pad_text
from wantrain.recipe import heldout
from wantrain.recipe.recipe import open_recipe
from wantrain.recipe.samples import Cached, prepare_texts, samples_of
from wantrain.recipe.training import prepare

CPU = torch.device("cpu")
OWN = ("validation.every_steps=2", "optim.lr=0.02")


def told(run: Path) -> list[dict[str, float]]:
    """The metrics lines with a validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def measures(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("validation_") and name != "validation_s"}


def test_the_numbers_are_those_of_the_base_and_of_the_adapter_row_by_row(trained, arguments, tmp_path: Path) -> None:
    run = trained("whole", *OWN)
    kept = json.loads((run / "validation.json").read_text())
    recipe, clips = opened(arguments)
    base = recipe.base.transformer(torch.float32, CPU)
    windows = {"heldout": clips.heldout, "trained": [clips.planned[0], clips.planned[4]]}
    assert kept["clips"] == {name: [p.name for p in own] for name, own in windows.items()}
    assert kept["sigmas"] == [0.25, 0.4286, 0.5625, 0.6667, 0.75, 0.8182, 0.875, 0.9231, 0.9643]  # 3x / (1 + 2x)
    rows = [(place, (5 * place + number) % 9) for number in range(5) for place in range(2)]
    for name, own in windows.items():
        sample = samples_of(clips, Cached(clips), own)
        for (place, s), loss in list(zip(rows, kept["base"][name], strict=True))[::3]:
            one, sigma = sample(place), kept["sigmas"][s]
            noise = torch.randn(one.latents_CTHW.shape, generator=flow.generator_for(
                "validation", own[place].found.digest, str(own[place].start_s), str(sigma)))
            with torch.no_grad():
                got = base(((1 - sigma) * one.latents_CTHW + sigma * noise)[None], torch.tensor([1000 * sigma]),
                           one.text_LD[None], return_dict=False)[0]
            assert loss == pytest.approx(float((got - (noise - one.latents_CTHW)).square().mean()), rel=1e-4)
    lines = told(run)
    assert [line["step"] for line in lines] == [2, 4]
    last, now = lines[-1], torch.tensor(kept["steps"]["4"]["heldout"])
    assert last["validation_loss"] == pytest.approx(float(now.mean()), rel=1e-6)
    assert last["validation_base"] == pytest.approx(sum(kept["base"]["heldout"]) / 10, rel=1e-6)
    assert last["validation_minus_base"] == pytest.approx(last["validation_loss"] - last["validation_base"], rel=1e-4)
    assert last["validation_minus_best"] == pytest.approx(last["validation_loss"] - lines[0]["validation_loss"],
                                                          rel=1e-4)
    gained = [last["validation_minus_base"], last["validation_trained_minus_base"]]
    assert last["validation_gap"] == pytest.approx(gained[0] - gained[1], rel=1e-6)
    assert last["validation_minus_base_ci95"] > 0
    assert last["validation_s"] > 0
    assert "validation_minus_best" not in lines[0]
    at_sigma = [i for i, (_, s) in enumerate(rows) if s == 0]  # the first clip's first pass, the second's last
    assert last["validation_sigma_0.2500"] == pytest.approx(float(now[at_sigma].mean()), rel=1e-6)
    assert list(measures(last)) == sorted(measures(last))
    assert_judged(run, lines)


def assert_judged(run: Path, lines: list[dict[str, float]]) -> None:
    """judgement.json says what the metrics say, and each clip's own losses."""
    found = json.loads((run / "judgement.json").read_text())
    assert found["steps"] == [line["step"] for line in lines]
    for name, key in (("heldout", "validation_loss"), ("trained", "validation_trained_loss")):
        assert found[name]["loss"] == pytest.approx([line[key] for line in lines])
        own = [clip for clip in found["clips"] if clip["set"] == name]
        for number, line in enumerate(lines):
            assert sum(clip["loss"][number] for clip in own) / len(own) == pytest.approx(line[key])
        assert all(Path(clip["file"]).is_file() and clip["end_s"] > clip["start_s"] for clip in own)
    assert [mean for mean, _ in found["gap"]] == pytest.approx([line["validation_gap"] for line in lines])
    assert found["by_sigma"]["0.2500"]["loss"] == pytest.approx([line["validation_sigma_0.2500"] for line in lines])
    assert found["drift"]["mean"] == pytest.approx([line["validation_drift"] for line in lines])
    assert found["verdict"]["best"] in found["steps"]


def test_drift_is_what_the_lora_changes_on_the_bases_own_way_over_what_the_caption_changes(arguments, cached) -> None:
    own = [*arguments, "validation.every_steps=4", "validation.sigmas=[0.9,0.5]", "validation.unrelated=[a, b, c]",
           "validation.budget_pct=400", "optim.ema=null"]
    recipe, clips = opened(own)
    prepare_texts(recipe, clips, CPU)
    training, base = prepare(recipe, clips), recipe.base.transformer(torch.float32, CPU)
    source = Cached(clips)
    made = heldout.open_validation(training, source)
    assert made is not None
    assert made.drift is not None
    assert made.drift.num_captions == 3
    for parameter in lora.trainable_parameters(training.model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    numbers = made.numbers(4)
    changed, whole = torch.zeros(2, 3), torch.zeros(2, 3)
    for place, caption in enumerate("abc"):
        text, empty = (pad_text(source.text(words))[None] for words in (caption, ""))
        x = 0.9 * torch.randn(1, 16, 2, 4, 6, generator=flow.generator_for("validation", "drift", caption))
        for number, (sigma, following) in enumerate(((0.9, 0.5), (0.5, 0.0))):
            with torch.no_grad():
                at = {"timestep": torch.tensor([1000 * sigma]), "return_dict": False}
                plain, other = (base(x, encoder_hidden_states=words, **at)[0] for words in (text, empty))
                adapted = training.model(hidden_states=x, encoder_hidden_states=text, **at)[0]
            changed[number, place], whole[number, place] = ((v - plain).square().mean() for v in (adapted, other))
            x = x + (following - sigma) * plain
    for number, name in enumerate(("0.9000", "0.5000")):
        wanted = (changed[number].sum() / whole[number].sum()).sqrt()
        assert numbers[f"validation_drift_sigma_{name}"] == pytest.approx(float(wanted), rel=1e-3)
    assert numbers["validation_drift"] == pytest.approx(float((changed.sum() / whole.sum()).sqrt()), rel=1e-3)


def test_the_base_is_measured_without_the_adapter_whatever_that_has_learnt(arguments, cached) -> None:
    own = [*arguments, "validation.every_steps=4", "validation.sigmas=[0.5]", "validation.unrelated=[]"]
    training = prepare(*opened(own))
    source = Cached(training.clips)
    fresh = heldout.open_validation(training, source)
    assert fresh is not None
    for parameter in lora.trainable_parameters(training.model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    learnt = heldout.begun(training, "", fresh.sets, fresh.extent)
    assert learnt.base == fresh.base
    now = heldout.measured(training, fresh.sets, fresh.rows)
    assert all(a != b for name in now for a, b in zip(now[name], fresh.base[name], strict=True))


@pytest.mark.slow
def test_a_resumed_run_says_the_same_and_measures_no_base_again(trained, monkeypatch) -> None:
    whole = trained("whole", *OWN)
    parts = trained("parts", *OWN, "train.num_steps=2")
    monkeypatch.setattr(heldout, "begun", None)
    trained("parts", *OWN)
    assert [measures(line) for line in told(parts)] == [measures(line) for line in told(whole)]


def test_what_was_kept_is_of_the_same_rows_and_not_of_steps_that_are_done_again(tmp_path: Path) -> None:
    training = SimpleNamespace(recipe=SimpleNamespace(run_dir=tmp_path), progress=SimpleNamespace(step=4),
                               accelerator=SimpleNamespace(is_main_process=True),
                               rendezvous=SimpleNamespace(first=lambda own: own))
    sets = {"heldout": SimpleNamespace(clips=[], sigmas=[0.5])}
    assert heldout.kept(training, "key", sets, validation.Extent(1, 1, 8)) is None
    steps = {2: {"heldout": [0.5]}, 4: {"heldout": [0.25]}, 6: {"heldout": [0.125]}}
    heldout.keep(heldout.Validation(training, "key", sets, validation.Extent(1, 1, 3), {"heldout": [1.0]}, steps))
    found = heldout.kept(training, "key", sets, validation.Extent(1, 1, 8))
    assert found is not None
    assert (found.base, found.extent.num_passes) == ({"heldout": [1.0]}, 3)
    assert found.steps == {step: losses for step, losses in steps.items() if step < 6}
    assert heldout.kept(training, "other", sets, validation.Extent(1, 1, 8)) is None
    (tmp_path / "validation.json").write_text("{")
    assert heldout.kept(training, "key", sets, validation.Extent(1, 1, 8)) is None


def test_a_budget_is_a_share_of_the_runs_forward_passes() -> None:
    config = load(["recipe=demo_anime", "train.num_steps=1000", "data.batch_size=8", "train.micro_batch_size=8",
                   "validation.every_steps=100", "validation.budget_pct=5"])
    rows = heldout.max_rows(config)
    assert rows == 23  # 5 % of 2 * 8 * 1000 forward passes: 11 times two sets, and drift, whose base counts twice
    assert (11 * 2 + 12) * rows <= 0.05 * 2 * 8 * 1000
    config.validation.unrelated = []
    assert heldout.max_rows(config) == 36


@pytest.mark.parametrize(("scatter", "wanted"), [(1e-4, {2}), (0.01, {3, 4, 5, 6, 7}), (10.0, {8})])
def test_draws_are_added_until_they_are_enough_or_the_budget_ends(monkeypatch, scatter, wanted) -> None:
    generator, asked = torch.Generator().manual_seed(0), []

    def measured(_training, sets, rows, with_adapter):
        assert not with_adapter
        asked.extend(len(own) for own in rows.values())
        return {name: (1 + scatter * torch.randn(len(own), generator=generator)).tolist() for name, own in rows.items()}

    monkeypatch.setattr(heldout, "measured", measured)
    monkeypatch.setattr(heldout, "keep", lambda _: None)
    made = heldout.begun(None, "key", {"heldout": None}, validation.Extent(1, 2, 16))
    draws = made.extent.num_passes // 2
    assert draws in wanted
    assert asked == [4, *[2] * (draws - 2)]  # none is measured twice
    assert len(made.base["heldout"]) == 2 * draws
    few = heldout.begun(None, "key", {"heldout": None}, validation.Extent(2, 9, 5))
    assert (few.extent.num_passes, asked[-1]) == (5, 10)


def test_each_expert_is_measured_at_the_deciles_of_its_own_part_of_the_schedule() -> None:
    recipe = open_recipe(load(["recipe=demo_anime"]))
    assert recipe.validation_sigmas[4] == 0.75
    narrowed = open_recipe(load(["recipe=demo_anime", "sigma.range=[0.4,0.6]"]))
    # shift 3 undone, 0.4 and 0.6 are 2/11 and 1/3; their middle 17/66 shifted again is 0.51
    assert narrowed.validation_sigmas[4] == pytest.approx(0.51, abs=1e-4)
    assert all(0.4 < sigma < 0.6 for sigma in narrowed.validation_sigmas)
    assert recipe.validation_sigmas == sorted(set(recipe.validation_sigmas))


def test_a_loss_that_is_not_finite_is_told_and_kept(monkeypatch) -> None:
    rows = {"heldout": [(0, 0, 0), (1, 0, 0)]}
    found = heldout.compared(rows, {"heldout": [math.nan, 1.0]}, {"heldout": [1.0, 1.0]}, [])
    assert math.isnan(found["validation_loss"])
    assert found["validation_base"] == 1.0
