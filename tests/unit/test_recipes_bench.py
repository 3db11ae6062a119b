"""benchmarks/recipes.py: its search, its tables, what it patches, and the numbers in docs/recipes.md."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks import patches, recipes
from tests import tiny_models
from wantrain.data import batches
from wantrain.density import Density
from wantrain.terms import Batch
from wantrain.tuner.told import Row
from wantrain.tuner.trainings import Outcome
from wantrain.validation import Interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "recipes.json"
ALL_RESULTS = RESULTS, ROOT / "benchmarks" / "draws.json", ROOT / "benchmarks" / "changes.json"


@pytest.mark.parametrize(("best", "tried"), [
    (1.0, [0.5, 1, 2, 4]), (2.0, [0.5, 1, 2, 4]), (0.5, [0.25, 0.5, 1, 2, 4]), (8.0, [0.5, 1, 2, 4, 8, 16]),
    (1000.0, [0.5, 1, 2, 4, 8, 16, 32])])
def test_the_search_ends_where_the_best_has_a_worse_one_on_both_sides(best: float, tried: list[float]) -> None:
    losses = recipes.searched(lambda lr: abs(math.log(lr / best)), 1.0)
    assert sorted(losses) == tried
    assert recipes.best_of(losses) == min(best, tried[-1])


def test_a_rate_that_diverges_is_never_the_best() -> None:
    assert recipes.best_of(recipes.searched(lambda lr: math.inf if lr > 1 else lr, 1.0)) == 2**-4


def test_better_and_worse_are_whole_intervals() -> None:
    rows = [Row("default", [0, 1]), *(Row(name, [0, 1], 0.5, Interval(mean, half)) for name, mean, half in (
        ("a", -0.2, 0.1), ("b", 0.2, 0.1), ("c", -0.1, 0.2), ("d", 0.1, 0.2), ("e", -1.0, math.nan)))]
    assert recipes.verdict("style", rows) == ("style: shown better than the default: a; shown worse: b; not shown to "
                                              "differ: c, d.")


def test_the_more_are_compared_the_wider_each_interval() -> None:
    """An arm better by a tenth, with seeds and clips that differ by hundredths: shown among two, and not among 60."""
    def outcomes(mean: float, spread: float) -> dict[int, Outcome]:
        return {seed: Outcome({clip: mean + spread * (seed - 1) * (1 + place) for place, clip in enumerate("abcd")})
                for seed in range(3)}

    arms = {"default": outcomes(1, 0), "better": outcomes(0.9, 0.01), "clear": outcomes(0.5, 0.001)}
    said = recipes.together({"style": recipes.Results(list("abcd"), [], {}, arms)})
    assert said.startswith("Of all 2 comparisons at once (Bonferroni): shown better than the default: better (style), "
                           "clear (style); shown worse: none")
    many = arms | {f"alike {number}": outcomes(1, 0) for number in range(58)}
    said = recipes.together({"style": recipes.Results(list("abcd"), [], {}, many)})
    assert said == ("Of all 60 comparisons at once (Bonferroni): shown better than the default: clear (style); shown "
                    "worse: none.")


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    told = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    measured = set()
    for path in ALL_RESULTS:
        known = json.loads(path.read_text(encoding="utf-8"))
        assert known["worlds"]
        assert not [line for line in recipes.tables(known) if line not in told.split("\n")]
        measured |= {arm for world in known["worlds"].values() for arm in world["losses"]}
    unmeasured = next(line for line in told.split("\n\n") if line.startswith("Not measured:"))
    assert all((f"`{arm}`" in unmeasured) == (arm not in measured) for arm in recipes.ARMS)


def test_results_go_through_their_file(tmp_path: Path) -> None:
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    path = tmp_path / "recipes.json"
    for world, own in known["worlds"].items():
        recipes.add(path, known["steps"], world, recipes.from_json(own))
    assert json.loads(path.read_text(encoding="utf-8")) == known
    recipes.add(path, known["steps"] + 1, world, recipes.from_json(own))  # of another length: the others are gone
    assert list(json.loads(path.read_text(encoding="utf-8"))["worlds"]) == [world]


@pytest.fixture
def transformer() -> Any:
    return copy.deepcopy(tiny_models.transformer("t2v")).eval()


def answer(transformer: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return transformer(hidden_states=latents, timestep=torch.tensor([400.0, 700.0]),
                           encoder_hidden_states=torch.linspace(-1, 1, 2 * 5 * 32).view(2, 5, 32))[0].detach()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def test_with_all_tokens_nothing_is_thinned(transformer: Any, latents: torch.Tensor) -> None:
    whole = answer(transformer, latents)
    with patches.only(transformer, torch.arange(3 * 2 * 3)):
        assert torch.equal(answer(transformer, latents), whole)
    assert torch.equal(answer(transformer, latents), whole)


def test_thinned_tokens_keep_their_places_and_do_not_see_the_others(transformer: Any, latents: torch.Tensor) -> None:
    """Kept are the first and the third latent frame: as if those were the clip, with their own rotary embedding."""
    kept = torch.cat([torch.arange(6), torch.arange(12, 18)])
    with patches.only(transformer, kept):
        thinned = answer(transformer, latents)[:, :, ::2]
        latents[:, :, 1] += 1
        assert torch.equal(answer(transformer, latents)[:, :, ::2], thinned)
    assert not torch.allclose(answer(transformer, latents)[:, :, ::2], thinned, atol=1e-6)

    neighbours = answer(transformer, latents[:, :, ::2])
    rotary = [part[:, kept] for part in transformer.rope(latents)]
    transformer.rope.forward = lambda given: rotary
    assert torch.allclose(answer(transformer, latents[:, :, ::2]), thinned, atol=1e-6)
    assert not torch.allclose(neighbours, thinned, atol=1e-6)


def test_independent_sigmas_leave_shares_of_the_batch_empty_and_keep_the_density() -> None:
    density = Density("uniform", (), 3.0, (0.0, 1.0))

    def shares(step: int) -> list[int]:  # the quarters of the density that four samples lie in: sigma = 3u / (1 + 2u)
        sigma = batches.draw_sigma(0, step, range(4), 4, density)
        return sorted((sigma / (3 - 2 * sigma) * 4).int().tolist())

    assert all(shares(step) == [0, 1, 2, 3] for step in range(50))
    with patches.independent():
        found = [shares(step) for step in range(500)]
    assert sum(own == [0, 1, 2, 3] for own in found) / 500 == pytest.approx(24 / 256, abs=0.04)
    assert all(sum(own.count(share) for own in found) == pytest.approx(500, abs=60) for share in range(4))


def test_motion_counts_by_the_larger_change_to_a_neighbour() -> None:
    latents = torch.zeros(1, 2, 3, 1, 2)
    latents[0, :, 1, 0, 0] = 3.0  # moves in the second frame, and back in the third
    latents[0, :, 2, 0, 1] = torch.tensor([-2.0, 4.0])  # moves in the third: 3 in the mean of both channels
    weight = patches.motion_weight(latents)
    # changes are 3 at five of six places (the first frame's second place stands still), so their mean is 2.5
    assert weight.flatten().tolist() == pytest.approx([2.2, 1, 2.2, 2.2, 2.2, 2.2])


def test_half_of_the_tokens_are_kept_and_others_in_each_step() -> None:
    def batch(sigma: float) -> Batch:
        return cast("Batch", SimpleNamespace(latents_BCTHW=torch.zeros(2, 16, 3, 8, 12),
                                             sigma_B=torch.tensor([sigma, 0.5])))

    first, again, second = (patches.kept_tokens(batch(sigma)).tolist() for sigma in (0.1, 0.1, 0.2))
    assert first == again == sorted(set(first))
    assert (len(first), first[0] >= 0, first[-1] < 72) == (36, True, True)
    assert first != second
