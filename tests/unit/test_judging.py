"""The numbers of videos on cases where the answer is known."""

import pytest
import torch

from tests.conftest import moving_square
from wantrain import judging

HEIGHT, WIDTH, FPS = 64, 96, 16


def texture(seed, height=HEIGHT, width=2 * WIDTH):
    """A picture of blobs some pixels wide, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0] * 255) \
        .clamp(0, 255).to(torch.uint8)


def pan(px, num_frames=9, seed=0):
    """A camera that moves to the right by `px` pixels a frame."""
    whole = texture(seed)
    return torch.stack([whole[:, :, px * f : px * f + WIDTH] for f in range(num_frames)])


def shuffled(frames):
    return frames[torch.tensor([4, 0, 7, 2, 8, 1, 6, 3, 5])]


@pytest.mark.parametrize("px", [1, 2, 3])
def test_a_pan_has_its_speed_and_is_smooth(px):
    found = judging.measure(pan(px), FPS)
    assert found["motion"] == pytest.approx(px * FPS / (HEIGHT**2 + WIDTH**2) ** 0.5, rel=0.1)
    assert found["smoothness"] > 0.9
    assert (found["frozen"], found["cuts"]) == (0, 0)


def test_half_a_pixel_a_frame_is_seen():
    whole = texture(1, 2 * HEIGHT, 4 * WIDTH)
    frames = torch.stack([whole[:, :, f : f + 2 * WIDTH] for f in range(9)])  # small() halves it
    moved_P2HW, _ = judging.displacements(judging.small(frames))
    assert moved_P2HW.mean((0, 2, 3)).tolist() == pytest.approx([0, -0.5], abs=0.06)


def test_shuffled_frames_are_not_smooth():
    frames = pan(2)
    assert judging.measure(shuffled(frames), FPS)["smoothness"] < judging.measure(frames, FPS)["smoothness"] - 0.4


def test_a_still_is_frozen_and_smooth_and_does_not_move():
    found = judging.measure(pan(0), FPS)
    assert found == {"motion": 0.0, "smoothness": 1.0, "flicker": 0.0, "frozen": 1.0, "cuts": 0.0}
    half = torch.cat([pan(2, 5), pan(2, 5)[-1:].expand(4, -1, -1, -1)])
    assert judging.measure(half, FPS)["frozen"] == 0.5
    assert judging.measure(pan(2)[:1], FPS) == {}


def test_light_that_jumps_is_flicker_and_no_motion():
    """Every second frame is darker by 20 of 255: the middle of two neighbours is 20 away."""
    frames = pan(0).clamp(min=20)
    frames[1::2] -= 20
    found = judging.measure(frames, FPS)
    assert found["flicker"] == pytest.approx(20 / 255, rel=0.02)
    assert found["motion"] < 0.05
    fade = torch.stack([(frames[0].float() * (1 - f / 16)).to(torch.uint8) for f in range(9)])
    assert judging.measure(fade, FPS)["flicker"] < 0.005


def test_a_cut_is_counted_and_motion_is_none():
    two = torch.cat([pan(2, 4, 0), pan(2, 5, 5)])
    assert judging.measure(two, FPS)["cuts"] == 1
    assert judging.measure(pan(3), FPS)["cuts"] == 0
    assert judging.measure(moving_square(0, 9, HEIGHT, WIDTH), FPS)["cuts"] == 0


def test_more_pairs_than_are_matched_at_once_are_the_same(monkeypatch):
    frames = pan(2)
    whole = judging.measure(frames, FPS)
    monkeypatch.setattr(judging, "PAIRS_AT_ONCE", 3)
    assert judging.measure(frames, FPS) == pytest.approx(whole)


def test_a_copy_of_a_training_frame_is_found_in_any_size_and_light():
    trained = torch.cat([judging.thumbs(pan(3, 9, seed)) for seed in range(3)])
    copied = pan(3, 9, 1)
    darker = (copied.float() * 0.6 + 30).to(torch.uint8)
    larger = torch.nn.functional.interpolate(copied.float(), scale_factor=2, mode="nearest").to(torch.uint8)
    assert judging.memorised(copied, trained) == pytest.approx(1, abs=1e-5)
    assert judging.memorised(darker, trained) > 0.99
    assert judging.memorised(larger, trained) > 0.99
    assert judging.memorised(pan(3, 9, 17), trained) < 0.7


def test_equal_pictures_have_no_diversity_and_opposite_ones_all():
    black, white = torch.zeros(3, 32, 48, dtype=torch.uint8), torch.full((3, 32, 48), 255, dtype=torch.uint8)
    assert judging.diversity([white, white, white]) == 0
    assert judging.diversity([black, white]) == 1
    assert judging.diversity([black, white, white]) == pytest.approx(2 / 3)
    assert 0 < judging.diversity([texture(1), texture(2)]) < judging.diversity([black, white])


def test_blur_is_another_texture():
    """Of style, the one number that sees it."""
    from wantrain import style

    sharp = pan(0).float()
    blurred = torch.nn.functional.avg_pool2d(sharp, 7, 1, 3).to(torch.uint8)
    described = [style.describe([video]) for video in (sharp.to(torch.uint8), blurred)]
    assert style.distance(described[0], described[0])["texture"] == 0
    assert style.distance(described[0], described[1])["texture"] > 0.1
