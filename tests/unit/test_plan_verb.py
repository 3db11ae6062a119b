"""`wantrain plan`: what it prints is its arithmetic, what it offers can be pasted, and it needs next to nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

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
    assert again["settings"]["as the recipe says"] == best
    for one in plan["settings"].values():
        config.load(["recipe=motion_i2v_14b", *one["overrides"]])


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
