"""The first-block cache: what it leaves out, what that changes, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from wantrain import results
from wantrain.config import load
from wantrain.models import sampling
from wantrain.recipe.sampler import load_pipeline, open_sampling, sampler_settings
from wantrain.terms import UserError

STEPS = 4


@pytest.fixture
def started(arguments, cached):
    """(pipeline, settings without a cache, noise, what denoising works from) of a prompt with guidance."""
    recipe = open_sampling(load([*arguments, f"sampler.num_steps={STEPS}"]))
    pipeline, settings = load_pipeline(recipe, {}, ["a square"]), sampler_settings(recipe)
    return pipeline, settings, *sampling.begin(pipeline, "a square", 0, settings, sampling.Inputs())


@torch.no_grad()
def by_hand(pipeline, settings, noise, given):
    """Denoised with what all blocks but the first added in the first step, of the prompt and of the negative one."""
    blocks, added, calls = pipeline.transformers[0].blocks, {}, []
    plain = [block.forward for block in blocks]

    def first(*inputs):
        calls.append(plain[0](*inputs))
        return calls[-1]

    def other(own):
        return lambda x, *rest: plain[own](x, *rest) if len(calls) <= 2 else x

    def last(x, *rest):
        text = (len(calls) - 1) % 2
        if len(calls) > 2:
            return calls[-1] + added[text]
        whole = plain[-1](x, *rest)
        added[text] = whole - calls[-1]
        return whole

    for own, block in enumerate(blocks):
        block.forward = first if own == 0 else last if own == len(blocks) - 1 else other(own)
    latents = sampling.denoise(pipeline, settings, noise, given)
    for block, forward in zip(blocks, plain, strict=True):
        block.forward = forward
    return latents


@torch.no_grad()
def test_a_threshold_between_nothing_and_all_leaves_out_passes_and_is_gone_afterwards(started):
    pipeline, settings, *rest = started
    plain = sampling.denoise(pipeline, settings, *rest)
    latents, saved = sampling.cached(pipeline, replace(settings, first_block_cache=1e-9), *rest)
    assert torch.equal(latents, plain)
    assert saved == 0
    latents, saved = sampling.cached(pipeline, replace(settings, first_block_cache=1e9), *rest)
    assert saved == 1 - 1 / STEPS
    assert torch.equal(latents, by_hand(pipeline, settings, *rest))
    assert not torch.equal(latents, plain)
    assert torch.equal(sampling.denoise(pipeline, settings, *rest), plain)


def test_what_a_cache_costs_is_measured_told_and_kept(wantrain, tmp_path, capsys):
    own = ("sampler.strengths=[0]", f"sampler.num_steps={STEPS}", "sampler.first_block_cache=1e9")
    assert wantrain("sample", *own) == 0
    told, = (line for line in capsys.readouterr().out.splitlines() if "first_block_cache" in line)
    kept = json.loads((tmp_path / "run" / "samples" / "first_block_cache.json").read_text())
    assert kept["passes saved"] == 1 - 1 / STEPS
    assert f"000_base has latents {100 * kept['error']:.1f} % from those without it, and 75 %" in told
    assert 0 < kept["error"] < 2
    assert wantrain("sample", *own) == 0
    assert results.read(tmp_path / "run" / "samples").provenance == {"first-block cache": kept}, "a second time as well"


@pytest.mark.parametrize("name", ["tiny_wan_vace", "tiny_wan_animate", "tiny_wan_animate2"])
def test_a_transformer_that_adds_between_its_blocks_is_refused_by_name(arguments, name):
    with pytest.raises(UserError, match=rf"sampler.first_block_cache.*null for {name}, "):
        load([*arguments, f"model.variant={name}", "sampler.first_block_cache=0.1"])
