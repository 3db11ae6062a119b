"""The tiny world and the trainers' shortcuts: deterministic scenes, three styles, and a VAE forward that is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tools.tiny_world import fast_vae, train_base, world
from tools.tiny_world.base import new_vae


def test_a_scene_is_a_function_of_its_seed_and_looks_different_in_each_style():
    scene = world.draw_scene(5)
    assert scene == world.draw_scene(5)
    assert scene != world.draw_scene(6)
    frames = {style: world.render(scene, style, 64, 96, 5) for style in world.STYLES}
    for style, first in frames.items():
        assert first.shape == (5, 3, 64, 96)
        assert first.dtype == np.uint8
        assert np.array_equal(first, world.render(scene, style, 64, 96, 5))
        for other, second in frames.items():
            assert style == other or np.abs(first.astype(int) - second).mean() > 8


def test_the_mask_covers_the_object_in_every_frame_and_leaves_the_rest():
    for seed in range(24):
        scene = world.draw_scene(seed)
        mask = world.mask(scene)
        one, other = (world.render(replace(scene, colour=colour), "natural").astype(int) for colour in ("red", "blue"))
        assert mask.shape == one.shape == (9, 3, 64, 96)
        assert not np.any((one != other) & (mask == 0))
        assert np.any((one != other) & (world.mask(scene, margin=-0.1) == 0))
        assert 0.1 < (mask == 255).mean() == (mask > 0).mean() < 0.5


def test_captions_say_what_is_drawn():
    for seed in range(20):
        scene = world.draw_scene(seed)
        for variant in range(4):
            assert world.caption(scene, variant).startswith(f"a {scene.colour} {scene.object} ")


@torch.no_grad()
def test_the_vae_over_all_frames_at_once_is_the_chunked_one():
    torch.manual_seed(0)
    vae = new_vae().eval()
    pixels_BCFHW = torch.randn(1, 3, 9, 32, 48)
    posterior = vae.encode(pixels_BCFHW).latent_dist
    moments = fast_vae.encode_moments(vae, pixels_BCFHW)
    torch.testing.assert_close(moments[:, :16], posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast_vae.decode(vae, posterior.mean).clamp(-1, 1), vae.decode(posterior.mean).sample,
                               atol=1e-5, rtol=1e-4)


def test_the_base_that_is_trained_starts_at_zero_velocity_and_has_a_gradient():
    base = train_base.Base()
    velocity = base(torch.randn(2, 16, 3, 8, 12), torch.tensor([0.2, 0.9]), ["a red house", ""])
    assert velocity.shape == (2, 16, 3, 8, 12)
    assert velocity.abs().max() == 0
    velocity.sum().backward()
    assert base.transformer.proj_out.weight.grad.abs().max() > 0
