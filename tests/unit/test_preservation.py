"""Masks, prior preservation and class words: what they weigh and what they aim at, against a base loaded apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.conftest import opened
from wantrain import flow, lora, objective
from wantrain.data.cache import missing
from wantrain.models.encode import predict_velocity
from wantrain.models.fit import fit
from wantrain.recipe.samples import Cached, Encoder, sample_of
from wantrain.recipe.training import prepare
from wantrain.stages import train

PRESERVE_ALL = ("data.sources.style.preserve=true", "data.sources.regularisation.preserve=true")
PRESERVE_PLAIN = ("data.sources.regularisation.preserve=true",)
WORDS = ("loss.class_words=shape", "loss.class_weight=0.5")
ALL_CLIPS = ("data.batch_size=8", "data.sources.regularisation.repeats=1")
"""A step shows each of the six clips with the trigger and of the two without it once."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prepared(arguments, cached):
    """prepared(overrides...) -> (training whose adapter has an effect, micro-batches of step 0)."""

    def call(*more, perturb=True):
        own = [*arguments, "train.micro_batch_size=${data.batch_size}", *more]
        training = prepare(*opened(own))
        if perturb:
            give_effect(training.model)
        return training, train.batch_maker(training, Cached(training.clips), 0)(0)

    return call


@pytest.fixture
def with_words(wantrain):
    """The session's cache has the captions with the class words."""
    assert wantrain("cache", *WORDS) == 0


def give_effect(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora.trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def noisy(batch):
    sigma = batch.sigma_B.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * batch.latents_BCTHW + sigma * batch.noise_BCTHW


@torch.no_grad()
def predicted(model, batch, text_BLD):
    return predict_velocity(model, noisy(batch), batch.sigma_B, text_BLD)


def base_of(training):
    """The frozen transformer, read from disk once more."""
    transformer = training.recipe.base.transformer(torch.float32, training.device)
    fit(transformer, training.device)
    return transformer


def squared(a_BCTHW, b_BCTHW):
    return (a_BCTHW - b_BCTHW).square().flatten(1).mean(1)


def numbers(training, micro_batches):
    found = train.train_step(training, 0, micro_batches)
    return found["loss"], found["grad_norm"]


# Prior preservation

def test_where_everything_is_preserved_the_first_step_has_nothing_to_learn(prepared):
    assert numbers(*prepared(*PRESERVE_ALL, perturb=False)) == (0.0, 0.0)
    loss, norm = numbers(*prepared(*PRESERVE_ALL))
    assert loss > 1e-3
    assert norm > 1e-3


def test_preserved_clips_aim_at_the_frozen_base_and_the_others_at_their_pixels(prepared):
    training, (batch,) = prepared(*PRESERVE_PLAIN, *ALL_CLIPS)
    asked = objective.loss_inputs(batch, training.recipe.objective, training.device, torch.float32)
    objective.ask_base(training.model, asked, torch.float32)
    plain = torch.tensor([p.clip.source == "regularisation" for p in batch.planned_B])
    assert plain.sum() == 2
    assert torch.equal(asked.target[~plain], (batch.noise_BCTHW - batch.latents_BCTHW)[~plain])
    wanted = predict_velocity(base_of(training), noisy(batch)[plain], batch.sigma_B[plain], batch.text_BLD[plain])
    assert torch.allclose(asked.target[plain], wanted, atol=1e-5)  # other operations than diffusers', equal numbers
    assert not asked.target.requires_grad
    with torch.no_grad():
        loss_B = training.losses(batch)
    torch.testing.assert_close(loss_B, squared(predicted(training.model, batch, batch.text_BLD), asked.target))


# Class words

def test_class_words_add_the_distance_from_the_base_and_only_where_the_trigger_is(prepared, with_words):
    training, (batch,) = prepared(*WORDS, *ALL_CLIPS)
    has_trigger = torch.tensor(["sqstyle" in p.clip.caption for p in batch.planned_B])
    assert has_trigger.sum() == 6
    source = Cached(training.clips)
    words_BLD = torch.stack([sample_of(training.clips, source, p, p.clip.caption.replace("sqstyle", "shape"),
                                             False).text_LD for p in batch.planned_B])
    own_B = squared(predicted(training.model, batch, batch.text_BLD), batch.noise_BCTHW - batch.latents_BCTHW)
    from_base_B = squared(predicted(training.model, batch, words_BLD), predicted(base_of(training), batch, words_BLD))
    assert from_base_B.min() > 1e-3
    with torch.no_grad():
        loss_B = training.losses(batch)
    torch.testing.assert_close(loss_B, own_B + 0.5 * has_trigger * from_base_B, rtol=1e-4, atol=0)


def test_class_words_cost_nothing_until_the_adapter_has_an_effect(prepared, with_words):
    plain, more = prepared(perturb=False), prepared(*WORDS, perturb=False)
    assert numbers(*more) == pytest.approx(numbers(*plain), rel=1e-5)


def test_samples_without_trigger_and_with_a_dropped_caption_have_no_class_words(prepared, with_words):
    _, (batch,) = prepared(*WORDS, *ALL_CLIPS)
    has_words = batch.class_text_BLD.ne(0).any(-1).any(-1).tolist()
    assert has_words == ["sqstyle" in p.clip.caption for p in batch.planned_B]
    _, (batch,) = prepared(*WORDS, "data.caption_dropout=1")
    assert batch.class_text_BLD is None


def test_class_words_without_any_trigger_are_refused(wantrain, capsys):
    assert wantrain("train", *WORDS, "data.trigger=sqstile") == 2
    assert "no training caption holds the trigger 'sqstile'" in capsys.readouterr().err


def test_the_cache_verb_makes_the_captions_with_the_class_words(arguments, wantrain, capsys):
    own = [*arguments, "loss.class_words=a figure"]
    _, clips = opened(own)
    wanted = {f"a figure, square number {i}" for i in range(6)}
    assert wanted <= {caption for _, caption in missing(clips.cache.entries([], clips.captions)).values()}
    assert wantrain("train", "loss.class_words=a figure") == 2
    assert "caption 'a figure, " in capsys.readouterr().err
    assert wantrain("cache", "loss.class_words=a figure") == 0
    assert missing(clips.entries) == {}


def test_the_cache_and_streaming_give_the_same_class_words(prepared, with_words):
    training, (batch,) = prepared(*WORDS, "data.num_workers=1", "train.num_steps=1")
    streamed, = train.batch_maker(training, Encoder(training.recipe, training.clips.cache, training.device), 0)(0)
    assert batch.class_text_BLD.ne(0).any()
    assert torch.equal(streamed.class_text_BLD, batch.class_text_BLD)
    assert torch.equal(training.losses(streamed), training.losses(batch))


# The adapter while the base answers

def test_the_adapter_is_on_again_after_the_base_has_answered(prepared, with_words, monkeypatch):
    training, (batch,) = prepared(*WORDS, *PRESERVE_PLAIN)
    before = predicted(training.model, batch, batch.text_BLD)
    with lora.switched_off(training.model):
        assert torch.allclose(predicted(training.model, batch, batch.text_BLD),
                              predicted(base_of(training), batch, batch.text_BLD), atol=1e-5)
    assert not torch.allclose(before, predicted(base_of(training), batch, batch.text_BLD), atol=1e-3)
    training.losses(batch)
    assert torch.equal(predicted(training.model, batch, batch.text_BLD), before)

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(objective, "predict_velocity", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.losses(batch)
    assert torch.equal(predicted(training.model, batch, batch.text_BLD), before)
    assert len(lora.trainable_parameters(training.model)) == 120


def test_an_adapter_that_was_off_stays_off(prepared):
    training, _ = prepared()
    lora.set_strength(training.model, 0)
    with lora.switched_off(training.model):
        pass
    layers = [layer for layer in training.model.modules() if isinstance(layer, BaseTunerLayer)]
    assert len(layers) == 60
    assert all(layer.disable_adapters for layer in layers)


# Masks and given frames

def left_half(batch):
    """A mask that looks at the left half of every latent frame."""
    mask = torch.zeros_like(batch.latents_BCTHW[:, :1])
    mask[..., : mask.shape[-1] // 2] = 1
    return mask


def exchanged(batch, where_B1THW):
    """Latents and noise change places there: at sigma 0.5 the model sees the same and should answer the opposite."""
    latents, noise = batch.latents_BCTHW, batch.noise_BCTHW
    return replace(batch, latents_BCTHW=torch.where(where_B1THW, noise, latents),
                   noise_BCTHW=torch.where(where_B1THW, latents, noise))


@torch.no_grad()
def test_what_lies_outside_a_mask_counts_nothing(prepared):
    training, (batch,) = prepared("loss.mask_background=0")
    batch = replace(batch, sigma_B=torch.full((4,), 0.5))
    mask = left_half(batch)
    masked = replace(batch, mask_B1THW=mask)
    outside, inside = exchanged(masked, mask == 0), exchanged(masked, mask == 1)
    assert torch.equal(noisy(outside), noisy(batch))
    loss_B = training.losses(masked)
    assert torch.equal(training.losses(outside), loss_B)
    assert (training.losses(inside) - loss_B).abs().min() > 0.01
    assert (training.losses(replace(outside, mask_B1THW=None))
            - training.losses(batch)).abs().min() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("background", [0.0, 0.25, 1.0])
def test_a_mask_weighs_the_errors_and_its_size_does_not(prepared, background):
    training, (batch,) = prepared(f"loss.mask_background={background}")
    mask = left_half(batch)
    mask[1] = 1
    mask[2, ..., 1:] = 0
    errors = (predicted(training.model, batch, batch.text_BLD) - batch.noise_BCTHW + batch.latents_BCTHW).square()
    weight = torch.where(mask == 1, 1.0, background).expand_as(errors)
    wanted_B = (errors * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
    torch.testing.assert_close(training.losses(replace(batch, mask_B1THW=mask)), wanted_B)
    if background == 1:
        torch.testing.assert_close(training.losses(batch), wanted_B)


@torch.no_grad()
def test_what_lies_outside_a_mask_may_be_held_at_the_base(prepared):
    training, (batch,) = prepared("loss.mask_preserve=0.5", *PRESERVE_PLAIN, *ALL_CLIPS)
    preserved = torch.tensor([p.clip.preserve for p in batch.planned_B])
    mask = left_half(batch)
    mask[int(preserved.logical_not().nonzero()[0])] = 1
    adapted, frozen = (predicted(model, batch, batch.text_BLD) for model in (training.model, base_of(training)))
    target = torch.where(preserved[:, None, None, None, None], frozen, batch.noise_BCTHW - batch.latents_BCTHW)
    inside, outside = ((part * (adapted - wanted).square()).flatten(1).sum(1) / (16 * part.flatten(1).sum(1))
                       for part, wanted in ((mask, target), (1 - mask, frozen)))
    wanted_B = inside + 0.5 * outside.nan_to_num(0)
    assert outside.isnan().sum() == 1
    torch.testing.assert_close(training.losses(replace(batch, mask_B1THW=mask)), wanted_B, rtol=1e-4, atol=0)
    torch.testing.assert_close(training.losses(batch), squared(adapted, target), rtol=1e-4, atol=0)


@torch.no_grad()
def test_given_first_frames_count_nothing_with_and_without_a_mask(prepared):
    training, (batch,) = prepared()
    known = torch.zeros(4, batch.latents_BCTHW.shape[2])
    known[:3, 0] = 1
    given = replace(batch, known_BT=known)
    other = replace(given, noise_BCTHW=torch.where(known.bool()[:, None, :, None, None], 7.0, given.noise_BCTHW))
    mask = left_half(batch)
    for mask_B1THW, kept in ((None, 1.0), (mask, mask)):
        loss_B = training.losses(replace(given, mask_B1THW=mask_B1THW))
        assert torch.equal(training.losses(replace(other, mask_B1THW=mask_B1THW)), loss_B)
        errors = (predict_velocity(training.model, flow.mix(given.latents_BCTHW, given.noise_BCTHW, given.sigma),
                                   given.sigma, given.text_BLD) - given.noise_BCTHW + given.latents_BCTHW).square()
        weight = ((1 - known)[:, None, :, None, None] * kept).expand_as(errors)
        torch.testing.assert_close(loss_B, (errors * weight).flatten(1).sum(1) / weight.flatten(1).sum(1))


# One batch, many parts

def with_masks(batches):
    """Each sample's mask a number of columns wide that is a function of its place in the global batch."""
    for batch in batches:
        batch.mask_B1THW = torch.zeros_like(batch.latents_BCTHW[:, :1])
        for mask, index in zip(batch.mask_B1THW, batch.index_B, strict=True):
            mask[..., : index + 1] = 1
    return batches


@pytest.mark.parametrize(("own", "change"), [
    pytest.param(PRESERVE_PLAIN, list, id="preserve"), pytest.param(WORDS, list, id="class words"),
    pytest.param((), with_masks, id="masks"),
    pytest.param((*WORDS, *PRESERVE_PLAIN, "loss.mask_preserve=0.5"), with_masks, id="all"),
])
def test_a_batch_of_four_is_four_accumulated_ones(prepared, with_words, own, change):
    whole, one = prepared(*own, "train.seed=1")
    assert {p.clip.source for p in one[0].planned_B} == {"style", "regularisation"}
    wanted = numbers(whole, change(one))
    parts, four = prepared(*own, "train.seed=1", "train.micro_batch_size=1")
    assert (len(one), len(four)) == (1, 4)
    assert numbers(parts, change(four)) == pytest.approx(wanted, rel=1e-4)
