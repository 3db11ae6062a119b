"""What other trainers of Wan get wrong (docs/facts.md, "Trainers"), one test a defect.

Those that have a test elsewhere:

| defect | test |
|---|---|
| I2V validated with the text-to-video pipeline, and the reverse | parity/test_tasks: diffusers_loads_the_export_... |
| log-variance normalised like the mean, then sampled | parity/test_base: latents_are_the_normalised_mode_and_... |
| cached latents + I2V condition crash; streamed unlike cached | parity/test_tasks: cached_is_streamed |
| zero latents in place of the VAE of grey frames | parity/test_task_inputs: i2v_is_given_mask_and_latents_of_... |
| text not padded to 512, or short text split at the wrong place | parity/test_task_inputs: every test of a task |
| CLIP tokens of the cropped centre | parity/test_task_inputs: i2v_..., flf2v_... |
| one file for two experts | parity/test_experts: both_train_in_their_own_folders_and_export_a_pair |
| experts trained one by one by hand | parity/test_experts: both_train_..., one_expert_at_a_time_and_going_on |
| the share of a schedule (65 % / 37.5 %) drawn as 2 % or 50 % | parity/test_experts: draws_stay_on_... |
| default targets that match nothing pass in silence | test_lora: a_target_that_matches_nothing_is_refused |
| a batch that cannot be dealt rounded down | test_bad_input: a_batch_that_cannot_be_dealt; test_config: a_mistake_... |
| clips dropped to fill a batch | test_batches: every_clip_is_seen_as_often_as_it_repeats_...; test_draws |
| what is batched computes otherwise | parity/test_task_inputs: a_sample_of_a_batch_computes_what_it_does_alone |
| alpha lost in the exported file, or read as rank | parity/test_export: the_file_holds_official_names_folded_alpha_...,
  an_export_that_reads_back_wrong_is_an_error; test_lora_formats: alpha_is_found_where_each_format_keeps_it |
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from wantrain import flow, lora
from wantrain.config import Config, Lora, Weighting, load
from wantrain.data import batches, plan
from wantrain.data.batches import Draws, Order, Split
from wantrain.data.cache import Cache
from wantrain.data.decode import choose_frames
from wantrain.data.plan import Plan
from wantrain.models import base, sampling
from wantrain.models.base import Base
from wantrain.models.conditioning import Encoders
from wantrain.models.encode import predict_velocity
from wantrain.models.fun import class_of
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.recipe.clips import Clips
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import lora_files, sampler_settings
from wantrain.recipe.training import prepare
from wantrain.stages import train
from wantrain.terms import Bucket, Clip, Encoded, MediaInfo, PlannedClip, Sample, UserError

CPU = torch.device("cpu")
BUCKET = Bucket(5, 32, 48)

# docs/facts.md, "Schedules"
BOUNDARIES = {"wan22_t2v_a14b": 0.875, "wan22_i2v_a14b": 0.9}
EXPERTS = [(name, expert) for name in BOUNDARIES for expert in ("high", "low")]


@functools.cache
def config_of(*overrides: str) -> Config:
    return load(["recipe=demo_anime", "sigma.distribution=null", *overrides])


def recipe_of(variant: str, expert: str | None = None, *overrides: str) -> Recipe:
    """A recipe without files."""
    parts = {"high": Path("high"), "low": Path("low")} if VARIANTS[variant].experts else {}
    return Recipe(config_of(*overrides), Base(VARIANTS[variant], parts, {}, expert))


def windows(number: int) -> list[PlannedClip]:
    return [PlannedClip(Clip(f"clip{i}", Path("x"), f"caption {i}", "s"), BUCKET, MediaInfo("d", 9.0), 16.0)
            for i in range(number)]


class Model(torch.nn.Module):
    """Notes what it is told, and answers with the mean of the text."""

    def __init__(self, name: str = "", told: list | None = None) -> None:
        super().__init__()
        self.name, self.told = name, [] if told is None else told
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.told.append((self.name, timestep))
        return (encoder_hidden_states.mean().float() * torch.ones_like(hidden_states, dtype=torch.float32),)


# Timesteps

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_each_frame", [False, True])
def test_the_timestep_is_neither_rounded_to_an_integer_nor_cast_to_bfloat16(dtype, of_each_frame):
    model, sigma_B = Model(), torch.tensor([0.9973, 0.8766, 0.5131])
    sigma = sigma_B[:, None].expand(3, 2) if of_each_frame else sigma_B
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        predict_velocity(model, torch.zeros(3, 16, 2, 4, 6, dtype=dtype), sigma, torch.zeros(3, 512, 8, dtype=dtype))
    (_, timestep), = model.told
    assert timestep.dtype == torch.float32
    want = 1000 * sigma_B
    assert torch.equal(timestep.view(3, -1), want[:, None].expand(3, 12 if of_each_frame else 1))
    assert want.tolist() == pytest.approx([997.3, 876.6, 513.1])


@torch.no_grad()
def test_a_bfloat16_base_hears_parts_of_a_timestep():
    transformer = base.find(VARIANTS["tiny_wan"], "embedded", {}).transformer(torch.bfloat16, CPU)
    noisy, text = torch.randn(2, 1, 16, 1, 4, 6, dtype=torch.bfloat16), torch.randn(1, 512, 128, dtype=torch.bfloat16)
    heard = []
    embedder = transformer.condition_embedder.time_embedder
    handle = embedder.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    for sigma in (0.9973, 0.9970):
        predict_velocity(transformer, noisy[0], torch.tensor([sigma]), text)
    handle.remove()
    assert heard[0].dtype == torch.float32
    assert not torch.equal(*heard)


# Experts

@pytest.mark.parametrize(("variant", "expert"), EXPERTS)
def test_an_expert_is_trained_where_it_works_and_with_the_boundary_of_its_own_task(variant, expert):
    boundary = BOUNDARIES[variant]
    recipe = recipe_of(variant, expert)
    assert recipe.sigmas == recipe.density(BUCKET).within == ((boundary, 1) if expert == "high" else (0, boundary))
    sigma = torch.cat([flow.draw_sigma(0, step, range(64), 64, recipe.density(BUCKET)) for step in range(20)])
    assert ((flow.timestep(sigma) >= 1000 * boundary) == (expert == "high")).all()
    between = (sigma > 0.875) & (sigma < 0.9)
    assert bool(between.any()) == ((variant, expert) in (("wan22_t2v_a14b", "high"), ("wan22_i2v_a14b", "low")))


@pytest.mark.parametrize(("variant", "expert"), EXPERTS)
def test_no_sample_of_a_batch_belongs_to_the_other_expert_whatever_the_first_or_the_mean_is(variant, expert):
    recipe = recipe_of(variant, expert)
    low, high = recipe.sigmas
    for step in range(5):
        batch, = batches.micro_batches(Order(windows(16), 16, 0), Split(16, 16, 1, 0), step, Draws(recipe.density),
                                       lambda *_: Sample(torch.zeros(16, 2, 4, 6), torch.zeros(512, 8)))
        assert ((batch.sigma_B >= low) & (batch.sigma_B < high)).all()


@pytest.mark.parametrize("within", ["[0.995,1]", "[0,0.005]", "[0.875,0.876]", "[0.0,1.0]"])
def test_a_batch_is_not_short_because_draws_fell_out_of_range(within):
    recipe = recipe_of("tiny_wan", None, f"sigma.range={within}")
    low, high = recipe.sigmas
    for step in range(50):
        batch, = batches.micro_batches(Order(windows(3), 4, 0), Split(4, 4, 1, 0), step, Draws(recipe.density),
                                       lambda *_: Sample(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1)))
        assert batch.sigma_B.shape == batch.latents_BCTHW.shape[:1] == batch.noise_BCTHW.shape[:1] == (4,)
        assert ((batch.sigma_B >= low) & (batch.sigma_B < high)).all()
        assert len(set(batch.sigma_B.tolist())) == 4


def test_a_boundary_that_is_no_integer_is_accepted_and_one_in_timesteps_is_not():
    assert load(["recipe=demo_anime", "sigma.range=[0.875,1.0]"]).sigma.range == [0.875, 1.0]
    with pytest.raises(UserError, match=r"sigma.*\[875.*\[0, 1\]"):
        load(["recipe=demo_anime", "sigma.range=[875,1000]"])


@pytest.mark.parametrize(("high", "low"), [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
def test_high_and_low_are_not_exchanged(tmp_path, high, low):
    """diffusers' `transformer` is the high noise expert (docs/facts.md, "Containers")."""
    for part in (low, high, "vae", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    found = base.find(VARIANTS["wan22_t2v_a14b"], str(tmp_path), {}).each()
    assert [(one.expert, one.parts["transformer"].name) for one in found] == [("high", high), ("low", low)]
    assert [replace(recipe_of("wan22_t2v_a14b"), base=one).sigmas for one in found] == [(0.875, 1), (0, 0.875)]


def test_sampling_takes_the_files_that_export_writes_of_each_expert(tmp_path):
    recipe = recipe_of("wan22_t2v_a14b", None, f"run.dir={tmp_path}")
    trainings = recipe.trainings()
    assert [one.base.expert for one in trainings] == ["high", "low"]
    paths = [one.export_path for one in trainings]
    paths[0].parent.mkdir(parents=True)
    paths[0].touch()
    with pytest.raises(UserError, match=paths[1].name):
        lora_files(recipe, [])
    paths[1].touch()
    assert lora_files(recipe, []) == {"high": [(paths[0], 1.0)], "low": [(paths[1], 1.0)]}
    assert paths[0] != paths[1]


# Previews

@pytest.mark.parametrize(("variant", "num_high"), [("wan22_t2v_a14b", 26), ("wan22_i2v_a14b", 15)])
def test_a_preview_is_not_made_by_one_expert_alone_nor_with_one_guidance(variant, num_high, monkeypatch):
    """Of 40 steps 26 (T2V) and 15 (I2V) are the high noise expert's: docs/facts.md, "Schedules", shares."""
    recipe = recipe_of(variant, None, "sampler.guidance=null", "sampler.num_steps=null")
    settings = replace(sampler_settings(recipe), guidance=(2.0, 7.0))
    assert settings.num_steps == 40
    told: list[tuple[str, torch.Tensor]] = []
    models = [Model("high", told), Model("low", told)]
    velocities, step = [], UniPCMultistepScheduler.step
    monkeypatch.setattr(UniPCMultistepScheduler, "step", lambda self, velocity, *args, **kwargs: (
        velocities.append(float(velocity.mean())), step(self, velocity, *args, **kwargs))[1])
    pipeline = sampling.Pipeline(VARIANTS[variant], models, None, Encoders(None, None), torch.float32)
    noise = torch.zeros(1, 16, 1, 4, 6)
    texts = [torch.ones(1, 512, 8), torch.zeros(1, 512, 8)]
    sampling.denoise(pipeline, settings, noise, sampling.DenoisingInputs(noise, None, {}, texts, False))
    assert Counter(name for name, _ in told) == {"high": 2 * num_high, "low": 2 * (40 - num_high)}
    for name, timestep in told:
        assert (float(timestep) >= 1000 * BOUNDARIES[variant]) == (name == "high")
    assert torch.cat([timestep for _, timestep in told[::2]]).tolist() == pytest.approx(
        [int(1000 * sigma) for sigma in settings.sigmas[:-1]])
    assert velocities == [7.0] * num_high + [2.0] * (40 - num_high), "0 without the prompt, 1 with it"


@pytest.mark.parametrize(("variant", "shift"), [
    ("wan21_t2v_1b3", 5), ("wan21_i2v_14b_480p", 3), ("wan21_i2v_14b_720p", 5), ("wan21_flf2v_14b", 16),
    ("wan21_vace_14b", 16), ("wan22_t2v_a14b", 12), ("wan22_i2v_a14b", 5), ("wan22_ti2v_5b", 5)])
def test_previews_are_not_all_made_with_one_shift(variant, shift):
    recipe = recipe_of(variant)
    settings = replace(sampler_settings(recipe), num_steps=20)
    assert settings.shift == shift
    before = torch.linspace(0.999, 0, 21, dtype=torch.float64)[:-1]  # docs/facts.md, "Sampler"
    want = shift * before / (1 + (shift - 1) * before)
    torch.testing.assert_close(torch.from_numpy(settings.sigmas[:-1]), want, rtol=1e-6, atol=1e-6)


# The draw and the loss

@pytest.mark.parametrize(("variant", "expert"), [*EXPERTS, ("wan21_i2v_14b_480p", None), ("wan21_flf2v_14b", None)])
def test_the_default_draw_is_the_tasks_own_schedule_and_no_bell(variant, expert):
    """A logit-normal, a shift of 5 for all or a weight by sigma would starve the high noise expert."""
    recipe = recipe_of(variant, expert)
    density = recipe.density(BUCKET)
    assert (density.name, density.shape, density.shift) == ("uniform", (), VARIANTS[variant].shift)
    assert recipe.config.loss.weighting is Weighting.none
    assert len({recipe.density(bucket) for bucket in (BUCKET, Bucket(81, 480, 832))}) == 1


def test_the_default_draw_of_text_to_video_is_the_one_that_won_and_a_setting_is_kept():
    """docs/recipes.md: logit-normal without a shift; experts have the schedule's share instead, whatever the recipe."""
    density = recipe_of("wan21_t2v_1b3").density(BUCKET)
    assert (density.name, density.shape, density.shift) == ("logit_normal", (0.0, 1.0), 1.0)
    sigma = load(["recipe=demo_anime", "sigma.shift=3"]).sigma
    assert sigma.drawn(VARIANTS["wan21_t2v_14b"]) == ("logit_normal", 3.0)
    sigma = load(["recipe=demo_anime", "sigma.distribution=logit_normal"]).sigma
    assert sigma.drawn(VARIANTS["wan21_t2v_14b"]) == ("logit_normal", 5.0)


# Frames

def test_the_tempo_does_not_depend_on_the_length_of_the_clip():
    short, long = np.arange(24) / 24, np.arange(24 * 60) / 24
    first = choose_frames(short, 0.0, 16, 9)
    assert first.tolist() == choose_frames(long, 0.0, 16, 9).tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    assert np.array_equal(choose_frames(long, 30.0, 16, 9) - 720, first)


@pytest.mark.parametrize("extract", plan.EXTRACTIONS)
def test_every_window_of_a_long_film_has_the_models_frame_rate(extract):
    film = MediaInfo("d", 30.0, 96, 64, "", 720)
    clip = Clip("film", Path("film.mp4"), "a film", "s")
    used = plan.place([clip], {clip.path: film}, plan.Rules([Bucket(81, 32, 48)], 16, extract)).used
    assert used
    assert {p.fps for p in used} == {16}
    assert max(p.latest_s or p.start_s for p in used) <= 30 - 81 / 16 + 1e-6


# Targets

@pytest.mark.parametrize("name", VARIANTS)
def test_the_default_targets_match_every_block_of_every_variant(name):
    variant = VARIANTS[name]
    small = replace(variant.architecture, num_layers=2, vace_layers=variant.architecture.vace_layers[:1])
    with torch.device("meta"):
        transformer = class_of(variant)(**diffusers_config(
            replace(variant, architecture=small)))
    assert Lora().targets == config_of().lora.targets == ["attn_ffn"]
    found = lora.match_targets(transformer, Lora().targets)
    of_each_block = 10 + 2 * (small.image_dim is not None)
    want = {f"blocks.{i}": of_each_block for i in range(2)} | {f"vace_blocks.{i}": 10 for i in range(
        len(small.vace_layers))}
    assert Counter(".".join(module.split(".")[:2]) for module in found) == want


# The step

class Noise:
    """Random latents and text in place of encoded clips."""

    def window(self, planned: PlannedClip) -> Encoded:
        return Encoded(torch.randn(16, 2, 4, 6, generator=flow.generator_for(planned.clip.id)))

    def text(self, caption: str) -> torch.Tensor:
        return torch.randn(7, 128, generator=flow.generator_for(caption))


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """steps(overrides...) -> (lr and length of the gradient at each update of three steps, their metrics)."""

    def run(*overrides: str) -> tuple[list[tuple[float, float]], list[dict[str, float]]]:
        config = config_of("tracker=none", "train.num_steps=3", "data.batch_size=2", "train.micro_batch_size=2",
                           f"run.dir={tmp_path_factory.mktemp('run')}", "optim.warmup_steps=0", "lora.rank=2",
                           "lora.alpha=2", *overrides)
        found = base.find(VARIANTS["tiny_wan"], "embedded", {})
        cache = Cache(tmp_path_factory.mktemp("cache"), "vae", "text", "")
        training = prepare(Recipe(config, found), Clips(config, found.variant, Plan(windows(4), []), [], cache))
        updates = []

        def note(optimizer, *_):
            rows = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
            updates.append((optimizer.param_groups[0]["lr"], float(torch.cat(rows).norm())))

        getattr(training.optimizer, "optimizer", training.optimizer).register_step_pre_hook(note)
        make = train.batch_maker(training, Noise(), 0)
        return updates, [train.train_step(training, step, make(step)) for step in range(3)]

    return run


def test_a_constant_schedule_does_not_begin_at_a_third(steps):
    updates, numbers = steps("optim.schedule=constant", "optim.lr=1e-3")
    assert [lr for lr, _ in updates] == [line["lr"] for line in numbers] == [1e-3] * 3


def test_gradients_are_clipped_before_the_update(steps):
    updates, numbers = steps("optim.max_grad_norm=1e-3")
    assert all(line["grad_norm"] > 0.01 for line in numbers), "the norm before it is told"
    assert [length for _, length in updates] == pytest.approx([1e-3] * 3, rel=1e-2)


def test_gradients_are_clipped_unless_asked_otherwise(steps):
    assert Config.__dataclass_fields__["optim"].default_factory().max_grad_norm == 1
    with pytest.raises(UserError, match=r"optim\.max_grad_norm"):
        load(["recipe=demo_anime", "optim.max_grad_norm=0"])
