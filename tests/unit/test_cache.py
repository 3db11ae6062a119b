"""The cache: nothing stale is read, nothing damaged is read, nothing right is rebuilt."""

import dataclasses
from pathlib import Path

import pytest
import torch

from wantrain.data.cache import CONDITION, LATENTS, MASK, TEXT, Cache, Conditioning
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip, UserError


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path, "vae", "text", "wantrain cache recipe=r")


CLIP = Clip("s/a", Path("a.mp4"), "a", "s", 1)
PLANNED = PlannedClip(CLIP, Bucket(5, 32, 48), MediaInfo("source", 3.0), 16.0)
ENTRY = (LATENTS, PLANNED)


def latents_path(cache, planned):
    return cache.path_of((LATENTS, planned))


def text_path(cache, caption):
    return cache.path_of((TEXT, caption))


def test_an_entry_reads_back_bitwise(cache):
    for tensor in (torch.randn(16, 2, 4, 6), torch.randn(7, 8).bfloat16()):
        cache.write(ENTRY, {"x": tensor})
        assert torch.equal(cache.read(ENTRY)["x"], tensor)


def test_each_thing_the_latents_depend_on_changes_their_address(cache):
    changed = [
        (dataclasses.replace(cache, vae_digest="other"), PLANNED),
        (cache, dataclasses.replace(PLANNED, fps=24.0)),
        (cache, dataclasses.replace(PLANNED, found=MediaInfo("other", 3.0))),
        (cache, dataclasses.replace(PLANNED, start_s=0.5)),
        (cache, dataclasses.replace(PLANNED, bucket=Bucket(9, 32, 48))),
    ]
    paths = [latents_path(c, p) for c, p in changed]
    assert len({latents_path(cache, PLANNED), *paths}) == len(changed) + 1


def test_what_latents_do_not_depend_on_leaves_their_address(cache):
    same = dataclasses.replace(PLANNED, clip=dataclasses.replace(
        CLIP, caption="b", repeats=4, id="s/b", end_s=0.5))
    assert latents_path(dataclasses.replace(cache, text_digest="other"), same) == latents_path(cache, PLANNED)


def test_text_depends_on_caption_and_encoder_only(cache):
    assert text_path(cache, "a") != text_path(cache, "b")
    assert text_path(cache, "a") != text_path(dataclasses.replace(cache, text_digest="other"), "a")
    assert text_path(cache, "a") == text_path(dataclasses.replace(cache, vae_digest="other"), "a")


def test_a_missing_entry_names_clip_and_command(cache):
    with pytest.raises(UserError, match="clip s/a") as caught:
        cache.read(ENTRY)
    assert caught.value.next_step == "wantrain cache recipe=r"


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_any_flipped_bit_anywhere_in_the_file_is_noticed_and_named(cache, bit):
    entry = (TEXT, "a")
    cache.write(entry, {"x": torch.arange(6.0).view(2, 3)})
    path = cache.path_of(entry)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        with pytest.raises(UserError, match=f"caption 'a' is damaged: {path}"):
            cache.read(entry)
    for length in (0, 7, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            cache.read(entry)
    path.write_bytes(whole + b" ")
    with pytest.raises(UserError, match="damaged"):
        cache.read(entry)


def test_non_finite_latents_are_refused_and_not_written(cache):
    with pytest.raises(UserError, match="non-finite"):
        cache.write(ENTRY, {"x": torch.tensor([1.0, float("nan")])})
    assert not latents_path(cache, PLANNED).exists()


def test_what_a_task_encodes_depends_on_the_task_its_encoder_the_vae_and_every_medium_it_is_made_of(cache):
    def partner(name, **settings):
        found = MediaInfo(name, 3.0)
        return dataclasses.replace(PLANNED, found=found, **settings)

    planned = dataclasses.replace(PLANNED, partners={"control": partner("c"), "mask": partner("m")})
    task = dataclasses.replace(cache, conditioning=Conditioning("control clip", ("clip", "control")))
    entry = task.path_of((CONDITION, planned))

    def moved(**settings):
        return dataclasses.replace(planned, **settings)

    elsewhere, less = Conditioning("other", ("clip", "control")), Conditioning("control clip", ("control",))
    changed = [
        task.path_of((CONDITION, moved(found=MediaInfo("other", 3.0)))),
        task.path_of((CONDITION, moved(partners=planned.partners | {"control": partner("other")}))),
        task.path_of((CONDITION, moved(partners=planned.partners | {"control": partner("c", start_s=1.0)}))),
        task.path_of((CONDITION, moved(bucket=Bucket(9, 32, 48)))),
        dataclasses.replace(task, vae_digest="other").path_of((CONDITION, planned)),
        dataclasses.replace(task, conditioning=elsewhere).path_of((CONDITION, planned)),
        dataclasses.replace(task, conditioning=less).path_of((CONDITION, planned)),
    ]
    assert len({entry, *changed}) == len(changed) + 1
    assert task.path_of((CONDITION, moved(partners=planned.partners | {"mask": partner("other")}))) == entry
    assert [kind for kind, _ in task.entries([planned], []).values()] == [LATENTS, MASK, CONDITION]
    assert [kind for kind, _ in cache.entries([planned], []).values()] == [LATENTS, MASK]
