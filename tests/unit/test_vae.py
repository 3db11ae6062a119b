"""The VAE in tiles: the numbers of diffusers' whole pass, within the memory that was asked for."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.allocations import Allocations
from tests.conftest import moving_square
from wantrain.models import base, encode, sizes, vae
from wantrain.models.variants import VARIANTS
from wantrain.terms import Bucket

CPU = torch.device("cpu")
TINY = base.find(VARIANTS["tiny_wan"], "embedded", {}).vae(CPU)
GIB = 2**30
LARGE = Bucket(81, 720, 1280)
SMALL_CARD = 12
ROUNDED = 0.51
"""What a byte may be off from a level that is not rounded: a half, and what another order of sums does."""


def thin(version: str) -> AutoencoderKLWan:
    """The published layers, which see as far as theirs, with few channels and random weights."""
    torch.manual_seed(0)
    own = {**sizes.VAES[version], "base_dim": 4}
    return AutoencoderKLWan(**(own | {"decoder_base_dim": 4} if version == "2.2" else own)).eval()


def on_meta(version: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The published VAE at full size, without memory."""
    with torch.device("meta"):
        return AutoencoderKLWan(**sizes.VAES[version]).to(dtype)


def counted_gib(own: AutoencoderKLWan, size: Bucket, tiles: tuple[int, int], decoding: bool) -> float:
    """The most that all tensors but the weights take together."""
    px = vae.scale_of(own) * (own.config.patch_size or 1)
    with torch.device("meta"), torch.no_grad(), Allocations() as found:
        found.count([*own.parameters(), *own.buffers()])
        weights = found.alive
        if decoding:
            shape = 1 + size.num_frames // 4, size.height // px, size.width // px
            vae.decode(own, torch.empty(1, own.config.z_dim, *shape, dtype=own.dtype), tiles)
        else:
            vae.encode(own, torch.empty(1, 3, size.num_frames, size.height, size.width, dtype=torch.uint8), tiles)
    return (found.peak - weights) / GIB


@pytest.mark.parametrize("tiles", [pytest.param((1, 1), marks=pytest.mark.slow), (1, 2),
                                   pytest.param((2, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["tiny", "2.1", pytest.param("2.2", marks=pytest.mark.slow)])
@torch.no_grad()
def test_any_tiles_give_what_diffusers_whole_pass_gives(which: str, tiles: tuple[int, int]) -> None:
    own = TINY if which == "tiny" else thin(which)
    px = vae.scale_of(own) * (own.config.patch_size or 1)
    sides = [px * (28 if number > 1 else 2) for number in tiles]
    pixels = torch.rand(1, 3, 5, *sides, generator=torch.Generator().manual_seed(1)) * 2 - 1
    want = own.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(vae.encode(own, pixels, tiles), want, rtol=0, atol=1e-5 * float(want.std()))
    latents = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    whole = own.decode(latents).sample
    frames, finite = vae.decode(own, latents, tiles)
    assert finite
    assert (frames.float() - (whole + 1) * 127.5).abs().max() < ROUNDED


@torch.no_grad()
def test_a_margin_of_fewer_latents_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own, pixels = thin("2.1"), torch.rand(1, 3, 1, 16, 8 * 28) * 2 - 1
    want = own.encode(pixels).latent_dist.mode()
    monkeypatch.setattr(vae, "ENCODER_MARGIN", vae.ENCODER_MARGIN - 4)
    assert (vae.encode(own, pixels, (1, 2)) - want).abs().max() > 1e-4 * want.std()
    latents = torch.randn(want.shape)
    monkeypatch.setattr(vae, "DECODER_MARGIN", vae.DECODER_MARGIN - 7)
    off = vae.decode(own, latents, (1, 2))[0].float() - (own.decode(latents).sample + 1) * 127.5
    assert off.abs().max() > ROUNDED


@torch.no_grad()
def test_diffusers_own_tiling_is_off_by_percents_on_the_trained_vae() -> None:
    pixels = vae.to_pixels(moving_square(0, 1, 96, 160)).movedim(0, 1)[None]
    want = TINY.encode(pixels).latent_dist.mode()
    TINY.enable_tiling(64, 64, 48, 48)
    theirs = TINY.encode(pixels).latent_dist.mode()
    TINY.disable_tiling()
    assert 0.02 < float((theirs - want).norm() / want.norm()) < 0.1
    assert float((vae.encode(TINY, pixels, (1, 2)) - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize(("number", "margin", "size"), [(1, 10, 7), (3, 10, 90), (8, 13, 160), (5, 2, 6)])
def test_tiles_part_a_side_without_gap_or_overlap(number: int, margin: int, size: int) -> None:
    tiles = vae.tiles_of(size, number, margin)
    assert [i for tile in tiles for i in range(tile.first, tile.last)] == list(range(size))
    assert all(tile.begin == max(0, tile.first - margin) and tile.end == min(size, tile.last + margin)
               for tile in tiles)


@pytest.mark.parametrize(("version", "decoding", "dtype"), [
    ("2.1", False, torch.float32), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("2.1", True, torch.float32), ("2.2", False, torch.float32), ("2.2", True, torch.float32),
        ("2.1", False, torch.bfloat16)])])
def test_what_it_needs_is_what_is_counted(version: str, decoding: bool, dtype: torch.dtype) -> None:
    own, size = on_meta(version, dtype), Bucket(9, 480, 832)
    needed = vae.bytes_needed(own, size, (1, 1), decoding=decoding) / GIB
    assert 0.99 < needed / counted_gib(own, size, (1, 1), decoding) < 1.1


def test_a_limit_is_kept_by_the_fewest_tiles_that_keep_it() -> None:
    """81 frames of 720 x 1280 on a card of 12 GiB: whole they need more than that, in two tiles 7.3 GiB and weights."""
    own, weights = on_meta("2.1"), sum(p.nbytes for p in on_meta("2.1").parameters()) / GIB
    limit = 0.95 * SMALL_CARD - weights
    for decoding in (False, True):
        assert vae.bytes_needed(own, LARGE, (1, 1), decoding=decoding) / GIB > SMALL_CARD - weights
        tiles = vae.tiles_for(own, LARGE, limit * GIB, decoding=decoding)
        assert tiles == (1, 2)
        assert vae.tiles_for(own, LARGE, float("inf"), decoding=decoding) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [False, True])
def test_the_whole_81_frames_stay_within_a_small_card(decoding: bool) -> None:
    own = on_meta("2.1")
    limit = 0.95 * SMALL_CARD - sum(p.nbytes for p in own.parameters()) / GIB
    found = counted_gib(own, LARGE, vae.tiles_for(own, LARGE, limit * GIB, decoding=decoding), decoding)
    print(f"{'decoding' if decoding else 'encoding'} {LARGE}: {found:.2f} GiB beside the weights")
    assert found < limit


@pytest.mark.parametrize(("dtype", "latents_off", "levels_off"), [(torch.bfloat16, 0.006, 3), (torch.float16, 8e-4, 1)])
def test_half_precision_is_as_near_as_docs_say(dtype: torch.dtype, latents_off: float, levels_off: int) -> None:
    film = moving_square(0, 5, 32, 48)
    found = base.find(VARIANTS["tiny_wan"], "embedded", {})
    half = found.vae(CPU, dtype)
    want, got = encode.encode_frames(TINY, film), encode.encode_frames(half, film)
    assert got.dtype == torch.float32
    assert 0.1 * latents_off < float((got - want).norm() / want.norm()) < latents_off
    whole, close = encode.decode_latents(TINY, want), encode.decode_latents(half, want)
    assert 0 < int((whole.int() - close.int()).abs().max()) <= levels_off


def test_frames_and_latents_pass_through_tiles_where_the_limit_is_low() -> None:
    film, size = moving_square(0, 1, 16, 384), Bucket(1, 16, 384)
    want = encode.encode_frames(TINY, film)
    low = 0.9 * vae.bytes_needed(TINY, size, (1, 1))
    assert vae.tiles_for(TINY, size, low) == (1, 2)
    assert vae.tiles_for(TINY, size, low, decoding=True) != (1, 1)
    torch.testing.assert_close(encode.encode_frames(TINY, film, low), want, rtol=0, atol=1e-5)
    assert (encode.decode_latents(TINY, want, low).int() - encode.decode_latents(TINY, want).int()).abs().max() <= 1
