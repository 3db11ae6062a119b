"""`wantrain plan`: what it prints is its arithmetic, what it offers can be pasted, and it needs next to nothing."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from wantrain import cli, config, costs


@pytest.fixture
def planned(capsys):
    """planned(arguments...) -> the numbers of `wantrain plan ARGUMENTS --json`."""
    def call(*arguments):
        assert cli.main(["plan", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)
    return call


def test_it_needs_neither_torch_nor_files_nor_much_time(tmp_path):
    code = ("import sys, resource; from wantrain import cli; code = cli.main(sys.argv[1:]); "
            "print([m for m in ('torch', 'diffusers', 'transformers', 'datasets', 'numpy') if m in sys.modules], "
            "resource.getrusage(resource.RUSAGE_SELF).ru_utime, code)")
    told = subprocess.run([sys.executable, "-c", code, "plan", "recipe=motion_i2v_a14b", "--gpu", "rtx4090"],
                          cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    loaded, seconds, exit_code = told.splitlines()[-1].rsplit(" ", 2)
    assert (loaded, exit_code) == ("[]", "0")
    assert float(seconds) < 2.5
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_its_numbers_with_a_bar_for_each_part(planned, capsys):
    plan = planned("recipe=anime_1b3", "--gpu", "24gb")
    assert cli.main(["plan", "recipe=anime_1b3", "--gpu", "24gb"]) == 0
    page = capsys.readouterr().out
    own = plan["settings"]["as the recipe says"]
    unit = max(24 * costs.GIB, own["peak"]) / 40
    for name, size in own["parts"].items():
        line = next(line for line in page.splitlines() if line.startswith(f"  {name} "))
        assert f"{size / costs.GIB:,.2f} GiB" in line
        assert 0 <= line.count("█") - size / unit < 1
    assert sum(own["parts"].values()) == own["peak"]


def test_what_it_offers_is_a_recipe_that_does_as_it_says(planned):
    plan = planned("recipe=motion_i2v_14b", "--gpu", "h200")
    best = plan["settings"]["fastest that fits"]
    assert best["peak"] <= plan["card"]["memory_gib"] * costs.GIB
    again = planned("recipe=motion_i2v_14b", "--gpu", "h200", *best["overrides"])
    assert again["settings"]["as the recipe says"] == {**best, "overrides": []}
    for one in plan["settings"].values():
        config.load(["recipe=motion_i2v_14b", *one["overrides"]])


def test_what_it_calls_fastest_is_no_slower_than_the_recipe_itself(planned, capsys):
    """Left to itself a training lets blocks keep differently, which no override says."""
    settings = planned("recipe=anime_a14b", "--gpu", "rtx4090")["settings"]
    own, best, smaller = (settings[name] for name in ("as the recipe says", "fastest that fits", "next smaller"))
    assert own["peak"] <= 24 * costs.GIB
    assert best == own
    assert smaller["peak"] < best["peak"]
    assert smaller["step"]["seconds"] >= best["step"]["seconds"] > settings.get("next faster", {"step": {"seconds": 0}}
                                                                              )["step"]["seconds"]
    assert cli.main(["plan", "recipe=anime_a14b", "--gpu", "rtx4090"]) == 0
    page = capsys.readouterr().out
    assert "10 keep all" in page
    assert page.endswith("next: wantrain train recipe=anime_a14b\n")
    slow = ["memory.base=dtype", "memory.keep=inputs", "memory.swap=40", "memory.offload=true"]
    changed = planned("recipe=anime_a14b", "--gpu", "rtx4090", *slow)["settings"]
    assert changed["fastest that fits"]["step"]["seconds"] < changed["as the recipe says"]["step"]["seconds"]


def test_the_arithmetic_that_docs_memory_md_follows_by_hand_is_the_plans(planned):
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    command = re.search(r"`wantrain plan ([^`]*)`, ([\d.]+) GiB in all", page)
    own = planned(*shlex.split(command[1]))["settings"]["as the recipe says"]
    assert round(own["peak"] / costs.GIB, 2) == float(command[2])
    parts = {name: size / costs.GIB for name, size in own["parts"].items()}
    parts["adapter, gradients, moments"] = parts.pop("adapter") + parts.pop("gradients") + parts.pop("optimizer")
    told = dict(re.findall(r"^\| ([\w', ]+) \| .* \| ([\d.]+) \|$", page, re.MULTILINE))
    assert [float(number) for number in told.values()] == pytest.approx([parts[name] for name in (
        "base", "adapter, gradients, moments", "kept activations", "working activations", "attention's workspace",
        "allocator's margin")], abs=0.006)


def test_price_gpus_and_experts(planned):
    one = planned("recipe=anime_a14b", "--gpu", "h100", "--price", "2")
    four = planned("recipe=anime_a14b", "--gpu", "h100", "--price", "2", "--gpus", "4")
    own, shared = one["settings"]["as the recipe says"], four["settings"]["as the recipe says"]
    assert own["price"] == pytest.approx(2 * own["hours"])
    assert shared["hours"] == pytest.approx(own["hours"] / 4)
    assert shared["price"] == pytest.approx(own["price"])
    assert shared["parts"]["gradients"] == 2 * own["parts"]["gradients"]
    high = planned("recipe=anime_a14b", "--gpu", "h100", "model.experts=high")["settings"]["as the recipe says"]
    low = planned("recipe=anime_a14b", "--gpu", "h100", "model.experts=low")["settings"]["as the recipe says"]
    assert own["hours"] == pytest.approx(high["hours"] + low["hours"])


def test_what_the_recipe_leaves_of_the_card_is_the_budget(planned):
    plan = planned("recipe=anime_1b3", "--gpu", "h100", "memory.gib=12")
    assert plan["card"]["memory_gib"] == 12
    assert plan["settings"]["fastest that fits"]["peak"] <= 12 * costs.GIB


def test_without_a_card_it_says_each_size(planned, capsys):
    plans = planned("recipe=anime_1b3")
    assert [plan["card"]["memory_gib"] for plan in plans] == list(costs.TYPICAL)
    assert cli.main(["plan", "recipe=anime_1b3"]) == 0
    page = capsys.readouterr().out
    assert all(f"{size} GiB at the speed of" in page for size in costs.TYPICAL)


@pytest.mark.parametrize(("given", "wanted"), [
    (["--gpu", "rtx9090"], ["gpu = 'rtx9090'", "rtx4090", "24gb"]),
    (["--gpus", "3"], ["--gpus 3", "data.batch_size = 4", "data.batch_size=3"]),
    (["--gpus", "0"], ["--gpus 0", "above 0"]), (["--price", "free"], ["--price", "free"])])
def test_what_it_cannot_use_it_says(capsys, given, wanted):
    assert cli.main(["plan", "recipe=anime_1b3", *given]) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in wanted), told


def test_help_has_the_options_and_the_keys(capsys):
    assert cli.main(shlex.split("plan --help")) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in ("--gpu CARD", "--price PER_HOUR", "--json", "memory.base"))


def test_a_training_keeps_what_the_plan_said_beside_its_peak(trained):
    run = trained("run", "train.num_steps=1")
    memory = json.loads((run / "run.json").read_text())["memory"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert memory["peak_gib"] >= last["memory_gib"]
    assert memory["peak_is_of"] == "the whole process"
    # the base, and keys and values of 512 tokens of text in 6 blocks for 4 samples: at 12 tokens there is little else
    assert memory["planned_gib"] == pytest.approx((15.97e6 + 6 * 2 * 4 * 512 * 192 * 4) / 2**30, rel=0.2)


def test_rates_that_are_measured_here_take_the_tables_place(planned, monkeypatch, capsys):
    """The card is the CPU: seconds of a step follow from its own rates, which no card of the table has."""
    import torch

    from wantrain.models import calibration

    assert cli.main(["plan", "recipe=anime_1b3", "--gpu", "here"]) == 2
    assert "there is no GPU" in capsys.readouterr().err
    rates = calibration.calibrate(torch.device("cpu"), 0.0, (64, 32, 2))
    assert min(rates.products, rates.attention, rates.attention_backward, rates.memory, rates.slot) > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 24 * costs.GIB))
    known = costs.card_of("rtx4090")
    for slower in (1.0, 2.0):
        peak = known.bf16_tflops * 1e12 / slower
        monkeypatch.setattr(calibration, "calibrate", lambda _, peak=peak, slower=slower: calibration.Rates(
            known.family.products * peak, known.family.attention * peak, known.family.attention_backward * peak,
            known.memory_gbs * 0.8e9 / slower, known.pcie_gbs * 0.8e9 / slower))
        own = planned("recipe=anime_1b3", "memory.keep=all", "--gpu", "here")["settings"]["as the recipe says"]
        table = planned("recipe=anime_1b3", "memory.keep=all", "--gpu", "rtx4090")["settings"]["as the recipe says"]
        assert own["step"]["seconds"] == pytest.approx(slower * table["step"]["seconds"])
    assert cli.main(["plan", "recipe=anime_1b3", "--gpu", "here"]) == 0
    assert "a card (24 GiB): arithmetic at rates measured here" in capsys.readouterr().out
