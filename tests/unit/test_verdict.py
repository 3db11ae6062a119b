"""The range of usable checkpoints, from numbers whose answer is plain."""

from __future__ import annotations

from dataclasses import replace

from wantrain.verdict import DIVERSITY_BAND, DRIFT_BAND, Measured, memorised_from, verdict

U_SHAPE = Measured([50, 100, 150, 200, 250], [0.70, 0.62, 0.60, 0.61, 0.66],
                   [(0.10, 0.02), (0.02, 0.03), (0.0, 0.0), (0.01, 0.02), (0.06, 0.01)],
                   [(-0.02, 0.01), (-0.10, 0.02), (-0.12, 0.02), (-0.11, 0.02), (-0.06, 0.02)])


def found(measured, **more):
    got = verdict(measured, **more)
    return got.best, got.first, got.last


def test_the_range_is_what_cannot_be_told_from_the_best_and_ends_where_a_later_step_can() -> None:
    assert found(U_SHAPE) == (150, 100, 200)
    told = " ".join(verdict(U_SHAPE).sentences)
    assert "steps 100 to 200" in told
    assert "lowest after step 150, 0.1200 +- 0.0200 below the base." in told
    assert "After step 250 held-out loss is above its best by 0.0600" in told


def test_a_loss_that_still_falls_has_a_range_without_an_end() -> None:
    falling = replace(U_SHAPE, losses=[0.7, 0.66, 0.62, 0.61, 0.60], minus_best=[
        (0.10, 0.02), (0.06, 0.02), (0.02, 0.01), (0.01, 0.02), (0.0, 0.0)])
    assert found(falling) == (250, 200, None)
    assert "has not ended" in " ".join(verdict(falling).sentences)
    assert "two of sampler.seeds" in " ".join(verdict(falling).sentences)
    assert "two of sampler.seeds" not in " ".join(verdict(replace(falling, diversity=[None] * 5)).sentences)


def test_drift_ends_the_range_before_the_loss_does_and_moves_the_best_into_its_band() -> None:
    drifting = replace(U_SHAPE, drift=[0.2, 0.4, DRIFT_BAND, DRIFT_BAND + 0.1, 9.0])
    assert found(drifting) == (150, 100, 150)
    assert f"After step 200 drift is {DRIFT_BAND + 0.1:.2f}" in " ".join(verdict(drifting).sentences)
    earlier = replace(U_SHAPE, drift=[0.2, 0.8, 3.2, 3.4, 3.8])
    assert found(earlier) == (100, 100, 100)
    all_out = replace(U_SHAPE, drift=[3.2, 3.4, 3.6, 3.8, 4.0])
    assert found(all_out) == (150, 150, 150)
    assert "No step has drift and diversity in their bands: after that one drift is 3.60" in " ".join(
        verdict(all_out).sentences)


def test_seeds_that_give_one_video_end_the_range_and_steps_without_samples_exclude_nothing() -> None:
    alike = replace(U_SHAPE, diversity=[None, 0.9, DIVERSITY_BAND, DIVERSITY_BAND - 0.1, 0.1])
    assert found(alike) == (150, 100, 150)
    assert f"After step 200 seeds differ {DIVERSITY_BAND - 0.1:.2f} times as much" in " ".join(verdict(alike).sentences)
    earlier = replace(U_SHAPE, diversity=[0.9, 0.7, 0.1, 0.1, 0.1])
    assert found(earlier) == (100, 100, 100)
    assert found(replace(U_SHAPE, diversity=[None] * 5)) == found(U_SHAPE)


def test_an_interval_that_is_unknown_excludes_nothing_and_one_around_0_is_no_gain() -> None:
    alone = replace(U_SHAPE, minus_best=[(0.1, None)] * 5, minus_base=[(-0.1, None)] * 5)
    assert found(alone) == (150, 50, None)
    assert "no measured gain" in verdict(alone).sentences[0]
    weak = replace(U_SHAPE, minus_base=[(-0.01, 0.02)] * 5)
    assert "no measured gain" in verdict(weak).sentences[0]


def test_overfitting_is_told_from_the_first_gap_above_0_and_memorising_where_it_is_known() -> None:
    told = verdict(replace(U_SHAPE, gap=[(-0.01, 0.02), (0.01, 0.02), (0.05, 0.02), (0.06, 0.02), (0.09, 0.01)]), 400)
    assert "Overfitting shows from step 150" in " ".join(told.sentences)
    assert told.memorised_from == 400
    assert "from about step 400" in told.sentences[-1]
    assert memorised_from(40, 8) == 105  # 21 passes over 40 clips, 8 samples a step
    assert not any("by heart" in text or "Overfitting" in text for text in verdict(U_SHAPE).sentences)
