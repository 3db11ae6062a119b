"""The style distance: zero for the same, one for opposites, blind to content, sharp for colour and for texture."""

import weakref

import torch

from tests.conftest import moving_square
from wantrain import style


def noise(seed, scale=1):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (4, 3, 32 // scale, 48 // scale), generator=generator, dtype=torch.uint8)
    return small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def test_equal_sets_are_at_zero_and_opposite_colours_at_one():
    black, white = torch.zeros(2, 3, 32, 48, dtype=torch.uint8), torch.full((2, 3, 32, 48), 255, dtype=torch.uint8)
    same = style.distance(style.describe([noise(0)]), style.describe([noise(0)]))
    assert same == {"style": 0.0, "colour": 0.0, "texture": 0.0}
    assert style.distance(style.describe([black]), style.describe([white]))["colour"] == 1.0


def test_it_is_symmetric_and_bounded():
    a, b = style.describe([moving_square(1, 4, 32, 48)]), style.describe([noise(3)])
    forth, back = style.distance(a, b), style.distance(b, a)
    assert forth == back
    assert all(0 < value <= 1 for value in forth.values())


def test_other_content_of_the_same_style_is_near_and_another_style_is_far():
    fine, fine_too, coarse = (style.describe([noise(s, scale) for s in seeds])
                              for seeds, scale in (((1, 2), 1), ((3, 4), 1), ((5, 6), 8)))
    assert style.distance(fine, fine_too)["style"] < 0.1
    assert style.distance(fine, coarse)["texture"] > 0.3
    assert style.distance(fine, coarse)["texture"] > 5 * style.distance(fine, fine_too)["texture"]


def test_texture_does_not_see_a_constant_colour():
    flat = [torch.full((1, 3, 32, 48), v, dtype=torch.uint8) for v in (10, 200)]
    assert style.describe(flat[:1]).gram.abs().max() < 1e-3
    assert style.describe(flat[1:]).gram.abs().max() < 1e-3


def test_frames_few_at_a_time_give_the_same_numbers(monkeypatch):
    videos = [torch.cat([moving_square(i, 5, 32, 48), noise(i)]) for i in range(2)]
    whole = style.describe(videos)
    monkeypatch.setattr(style, "PIXELS_AT_ONCE", 2 * 32 * 48)
    parts = style.describe(video for video in videos)
    torch.testing.assert_close(parts.histogram, whole.histogram, rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-5, atol=1e-7)


def test_no_more_pixels_are_held_than_the_limit(monkeypatch):
    held = []
    grams = style._grams
    monkeypatch.setattr(style, "_grams", lambda frames: held.append(frames.shape) or grams(frames))
    monkeypatch.setattr(style, "PIXELS_AT_ONCE", 3 * 32 * 48)
    style.describe([moving_square(0, 8, 32, 48), moving_square(0, 2, 96, 96)])
    assert [shape[0] for shape in held] == [3, 3, 2, 1, 1]


def test_nothing_of_a_frame_is_kept_while_the_next_ones_are_described(monkeypatch):
    """Small tensors that stay, between large ones that go, keep the allocator from using these places again: some 10
    MiB more for each frame of 480x832.
    """
    given, alive, grams = [], [], style._grams

    def watched(frames):
        alive.append(sum(tensor() is not None for tensor in given))
        found = grams(frames)
        given.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(style, "_grams", watched)
    monkeypatch.setattr(style, "PIXELS_AT_ONCE", 32 * 48)
    style.describe([moving_square(0, 8, 32, 48)])
    assert len(alive) == 8
    assert max(alive) == 0
