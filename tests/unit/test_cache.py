"""The cache: nothing stale is read, nothing damaged is read, nothing right is rebuilt."""

import dataclasses
from pathlib import Path

import pytest
import torch

from wantrain.data.cache import Cache
from wantrain.terms import Bucket, Clip, PlannedClip, UserError


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path, "vae", "text", 16, "wantrain cache recipe=r")


CLIP = Clip("s/a", Path("a.mp4"), "a", "s", 1)
PLANNED = PlannedClip(CLIP, Bucket(5, 32, 48), "source")


def test_an_entry_reads_back_bitwise(cache):
    for tensor in (torch.randn(16, 2, 4, 6), torch.randn(7, 8).bfloat16()):
        path = cache.latents_path(PLANNED)
        cache.write(path, tensor, "clip a")
        assert torch.equal(cache.read(path, "clip a"), tensor)


def test_each_thing_the_latents_depend_on_changes_their_address(cache):
    changed = [
        (dataclasses.replace(cache, vae_digest="other"), PLANNED),
        (dataclasses.replace(cache, fps=24), PLANNED),
        (cache, dataclasses.replace(PLANNED, source_digest="other")),
        (cache, dataclasses.replace(PLANNED, bucket=Bucket(9, 32, 48))),
        (cache, dataclasses.replace(PLANNED, clip=dataclasses.replace(CLIP, start_s=0.5))),
        (cache, dataclasses.replace(PLANNED, clip=dataclasses.replace(CLIP, end_s=0.5))),
    ]
    paths = [c.latents_path(p) for c, p in changed]
    assert len({cache.latents_path(PLANNED), *paths}) == len(changed) + 1


def test_what_latents_do_not_depend_on_leaves_their_address(cache):
    same = dataclasses.replace(PLANNED, clip=dataclasses.replace(CLIP, caption="b", repeats=4, id="s/b"))
    assert dataclasses.replace(cache, text_digest="other").latents_path(same) == cache.latents_path(PLANNED)


def test_text_depends_on_caption_and_encoder_only(cache):
    assert cache.text_path("a") != cache.text_path("b")
    assert cache.text_path("a") != dataclasses.replace(cache, text_digest="other").text_path("a")
    assert cache.text_path("a") == dataclasses.replace(cache, vae_digest="other").text_path("a")


def test_a_missing_entry_names_clip_and_command(cache):
    with pytest.raises(UserError, match="clip s/a") as caught:
        cache.read(cache.latents_path(PLANNED), "clip s/a")
    assert caught.value.next_step == "wantrain cache recipe=r"


def test_any_flipped_byte_of_the_data_is_noticed(cache):
    path = cache.text_path("a")
    cache.write(path, torch.arange(6.0).view(2, 3), "caption a")
    whole = path.read_bytes()
    for place in range(len(whole) - 24, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(UserError, match="damaged"):
            cache.read(path, "caption a")
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="not a readable"):
        cache.read(path, "caption a")


def test_non_finite_latents_are_refused_and_not_written(cache):
    with pytest.raises(UserError, match="non-finite"):
        cache.write(cache.latents_path(PLANNED), torch.tensor([1.0, float("nan")]), "clip a")
    assert not cache.latents_path(PLANNED).exists()
