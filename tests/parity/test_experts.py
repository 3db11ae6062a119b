"""The two experts of A14B: two trainings over one cache, each in its own range of sigma, exported as a pair."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from tests.tiny_tasks import official_steps, pipeline, write_a14b
from wantrain import flow, objective, results
from wantrain.config import load
from wantrain.density import share_of_schedule
from wantrain.engine import saved
from wantrain.models import base, comfy_workflow, sampling
from wantrain.models.lora_formats import read_lora
from wantrain.models.lora_updates import worst_difference
from wantrain.models.variants import VARIANTS
from wantrain.recipe.recipe import Recipe
from wantrain.terms import Bucket, UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    return write_a14b(tmp_path_factory.mktemp("a14b"))


@pytest.fixture
def own(a14b):
    """Overrides that put the small recipe on it."""
    return ["model.variant=tiny_wan_a14b", f"model.path={a14b}", "train.num_steps=2", "optim.lr=0.05"]


def exported(run):
    return {expert: run / "export" / f"demo_anime_{expert}_noise.safetensors" for expert in ("high", "low")}


PUBLISHED = sorted(name for name, row in VARIANTS.items() if not name.startswith("tiny"))
EXPERTS_OF = [(name, expert) for name in PUBLISHED for expert in VARIANTS[name].experts or (None,)]
# docs/facts.md, "Schedules": the boundary, and the share of the continuous schedule above it.
BOUNDARIES = {"wan22_t2v_a14b": (0.875, 0.632), "wan22_i2v_a14b": (0.9, 0.357)}
MILLION = 1_000_000


@functools.cache
def config():
    return load(["recipe=demo_anime", "sigma.distribution=uniform", "sigma.shift=null"])


def density_of(name, expert):
    """How training draws sigma of a variant, unless told otherwise."""
    own = base.Base(VARIANTS[name], {}, {}, expert)
    return Recipe(config(), own).density(Bucket(5, 32, 48))


def below(sigma, shift):
    """The share of the inference schedule below sigma: the shift multiplies the odds of noise."""
    odds = sigma / (1 - sigma) / shift
    return odds / (1 + odds)


@functools.cache
def million(density, shift, low, high):
    """(the least and the largest of the draws of a hundred steps of 10,000 samples, their KS distance to the part
    [low, high) of the schedule).
    """
    drawn = torch.cat([flow.draw_sigma(0, step, range(10_000), 10_000, density) for step in range(100)]).sort().values
    assert drawn.dtype == torch.float32
    assert len(drawn) == MILLION
    from_, until = below(low, shift), below(high, shift) if high < 1 else 1
    wanted = (below(drawn.double(), shift) - from_) / (until - from_)
    ranks = torch.arange(MILLION, dtype=torch.float64) / MILLION
    return drawn[[0, -1]], max(float((wanted - ranks).max()), float((ranks + 1 / MILLION - wanted).max()))


@pytest.mark.parametrize(("variant", "expert"), EXPERTS_OF)
def test_a_million_draws_stay_on_the_experts_side_and_are_its_part_of_the_schedule(variant, expert):
    row = VARIANTS[variant]
    low, high = {"high": (row.boundary, 1), "low": (0, row.boundary), None: (0, 1)}[expert]
    ends, distance = million(density_of(variant, expert), row.shift, low, high)
    assert low <= float(ends[0]) < float(ends[1]) < high
    if expert:
        is_high = flow.timestep(ends) >= 1000 * row.boundary  # as diffusers asks
        assert is_high.tolist() == [expert == "high"] * 2
    assert distance < 0.002


@pytest.mark.parametrize("variant", [name for name in PUBLISHED if VARIANTS[name].experts])
def test_draws_over_the_whole_range_are_shared_as_inference_shares_its_schedule(variant):
    row = VARIANTS[variant]
    boundary, share = BOUNDARIES["wan22_t2v_a14b" if row.task in ("t2v", "vace") else "wan22_i2v_a14b"]
    assert [row.sigmas_of(expert) for expert in row.experts] == [(boundary, 1), (0, boundary)]
    u = (torch.arange(MILLION, dtype=torch.float64) + 0.5) / MILLION
    whole = replace(density_of(variant, "high"), within=(0.0, 1.0))
    is_high = flow.timestep(flow.sigma_at(u, whole)) >= 1000 * boundary
    assert float(is_high.double().mean()) == pytest.approx(share, abs=0.002)
    assert share_of_schedule(row.shift, boundary, 1) == pytest.approx(share, abs=5e-4)
    assert share_of_schedule(row.shift, 0, boundary) == pytest.approx(1 - share, abs=5e-4)


@pytest.mark.parametrize("variant", [name for name in PUBLISHED if VARIANTS[name].experts])
def test_the_draw_nearest_to_the_boundary_does_not_round_onto_it(variant):
    boundary = VARIANTS[variant].boundary
    ends = torch.tensor([0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    *_, last = flow.timestep(flow.sigma_at(ends, density_of(variant, "low"))).tolist()
    assert 1000 * boundary - 0.01 < last < 1000 * boundary
    first, *_ = flow.timestep(flow.sigma_at(ends, density_of(variant, "high"))).tolist()
    assert 1000 * boundary <= first < 1000 * boundary + 0.01


def test_each_expert_is_trained_at_its_own_sigmas_only(wantrain, own, monkeypatch):
    asked = []
    predict = objective.predict_velocity

    def recording(model, noisy, sigma_B, *more):
        asked.append(sigma_B)
        return predict(model, noisy, sigma_B, *more)

    monkeypatch.setattr(objective, "predict_velocity", recording)
    assert wantrain("train", *own, "train.num_steps=6") == 0
    high, low = torch.stack(asked).chunk(2)
    assert (high >= 0.875).all()
    assert (low < 0.875).all()
    assert high.max() - high.min() > 0.08
    assert low.max() - low.min() > 0.5


def test_both_train_in_their_own_folders_and_export_a_pair(wantrain, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(comfy_workflow.FILES, "tiny_wan_a14b", "tiny_{}.safetensors")
    assert wantrain("check", *own) == 0
    shown = capsys.readouterr().out
    assert "high noise expert: uniform, shift 12, in [0.875, 1]: 63.2% of the schedule" in shown
    assert "low noise expert: uniform, shift 12, in [0, 0.875]: 36.8% of the schedule" in shown
    assert wantrain("train", *own) == 0
    assert wantrain("export", *own) == 0
    run = tmp_path / "run"
    for expert, path in exported(run).items():
        header = json.loads((run / expert / "run.json").read_text())
        metadata = read_lora(path).metadata
        assert header["expert"] == metadata["wantrain.expert"] == expert
        assert metadata["wantrain.base_digest"] == header["base_digest"]
        assert metadata["modelspec.timestep_range"] == ("875,1000" if expert == "high" else "0,875")
        assert len((run / expert / "metrics.jsonl").read_text().splitlines()) == 2
    one, other = (load_file(path) for path in exported(run).values())
    assert one.keys() == other.keys()
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_B" in name)
    graph = json.loads((run / "export" / "demo_anime.workflow.json").read_text())
    assert [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoraLoaderModelOnly"] == [
        path.name for path in exported(run).values()]


def test_diffusers_loads_the_pair_and_samples_what_we_sample(wantrain, own, a14b, tmp_path):
    assert wantrain("train", *own) == 0
    assert wantrain("export", *own) == 0
    pair = exported(tmp_path / "run")
    theirs = WanPipeline.from_pretrained(a14b, dtype=torch.float32)
    plain = WanPipeline.from_pretrained(a14b, dtype=torch.float32)
    theirs.load_lora_weights(str(pair["high"]))
    theirs.load_lora_weights(str(pair["low"]), load_into_transformer_2=True)
    found = base.find(VARIANTS["tiny_wan_a14b"], str(a14b), {})
    assert [one.expert for one in found.each()] == ["high", "low"]
    ours = pipeline(found, pair)
    low, high = 1.0, 60.0  # far apart, as random experts hardly hear the prompt
    one = sampling.sample(ours, "a square", 1, sampling.Settings(4, (low, high), 12.0, sampling.Bucket(5, 32, 48), ""))
    for other, guidance, differs in ((theirs, (high, low), False), (theirs, (low, high), True),
                                        (plain, (high, low), True)):
        other.scheduler = official_steps(found, 12.0)
        video_BFHWC = other("a square", negative_prompt="", height=32, width=48, num_frames=5, num_inference_steps=4,
                               guidance_scale=guidance[0], guidance_scale_2=guidance[1], output_type="np",
                               generator=torch.Generator().manual_seed(1)).frames
        difference = abs(one.movedim(1, -1).numpy() / 255 - video_BFHWC[0]).mean()
        assert difference > 0.01 if differs else difference < 0.004, "rounding to bytes costs 0.002"


def test_one_expert_at_a_time_and_going_on(wantrain, own, tmp_path):
    """Training high alone and then both leaves high as it was; each may start from its own half of a pair."""
    assert wantrain("train", *own, "model.experts=high") == 0
    run = tmp_path / "run"
    assert not (run / "low").exists()
    first = saved.steps_on_disk(run / "high" / "checkpoints")[-1].stat().st_mtime_ns
    assert wantrain("export", *own, "model.experts=high") == 0
    assert wantrain("train", *own) == 0
    assert saved.steps_on_disk(run / "high" / "checkpoints")[-1].stat().st_mtime_ns == first
    assert wantrain("export", *own) == 0
    pair = exported(run)
    template = str(run / "export" / "demo_anime_{expert}_noise.safetensors")
    more = [*own, f"run.dir={tmp_path / 'more'}", f"lora.start_from='{template}'", "optim.lr=1e-12",
            "optim.weight_decay=0"]
    assert wantrain("train", *more) == 0
    assert wantrain("export", *more) == 0
    for expert, path in exported(tmp_path / "more").items():
        assert worst_difference(read_lora(pair[expert]), read_lora(path))[0] < 1e-5
    for part, merge in (("high", "low"), ("low", "high")):
        merged = base.find(VARIANTS["tiny_wan_a14b"], own[1].partition("=")[2], {}, [template]).each()
        assert merged[part == "low"].merged == [(pair[part], 1.0)] != [(pair[merge], 1.0)]


@pytest.mark.slow
def test_sampling_and_the_report_of_both(wantrain, own, tmp_path):
    own = [*own, "validation.every_steps=2", "validation.sigmas=[0.5,0.95]"]
    for verb in ("train", "export", "sample", "evaluate"):
        assert wantrain(verb, *own) == 0
    run = tmp_path / "run"
    provenance = results.read(run / "report").provenance
    assert list(provenance) == ["run high", "run low", *(f"LoRA file {path}" for path in exported(run).values()),
                                "held-out loss by sigma"]
    last = {expert: json.loads((run / expert / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
            for expert in ("high", "low")}
    low, high = (found["strength_1"] for found in provenance["held-out loss by sigma"].values())
    assert (last["low"], last["high"]) == pytest.approx((low, high), rel=1e-4), "each sigma by its own expert"
    assert (run / "report" / "report.html").is_file()


def test_what_is_no_pair_is_refused(wantrain, own, a14b, capsys, tmp_path):
    assert wantrain("check", "model.experts=high") == 2
    assert "tiny_wan has one transformer" in capsys.readouterr().err
    assert wantrain("check", *own, "model.experts=middle") == 2
    (tmp_path / "wan2.2_low_noise").symlink_to(a14b / "transformer")
    exchanged = base.find(VARIANTS["tiny_wan_a14b"], str(a14b), {"high": str(tmp_path / "wan2.2_low_noise")})
    with pytest.raises(UserError, match="is named as the low noise expert, but is given as the high one"):
        exchanged.each()[0].detected()
    with pytest.raises(UserError, match=r"unknown config key model\.parts\.transformer; there are high, low"):
        base.find(VARIANTS["tiny_wan_a14b"], str(a14b), {"transformer": "x"})
