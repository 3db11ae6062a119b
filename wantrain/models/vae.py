"""The VAE over any size of video, within a limit of memory: where the whole is too large, tiles in space.

diffusers' VAE goes through a video in chunks (one frame, then four at a time) and keeps the last features of each
causal convolution, so its memory does not grow with the length, but with the picture. Here the layers that work on many
pixels see one tile after the other, each with a margin as wide as those layers can see; the layers at the size of
latents, whose attention looks at the whole picture, see the whole. So tiles change no number beyond rounding.
diffusers' own tiling sends tiles through all layers and blends what differs (docs/memory.md says how far it is off).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

from wantrain.terms import Bucket

ENCODER_MARGIN, DECODER_MARGIN = 10, 13
"""Latents by which a tile is larger on each side. Followed through the layers of the published VAEs (four sizes, each
half of the one before; two residual blocks of two 3 x 3 convolutions each in the encoder, three in the decoder): the
encoder sees 1 + 4 * (1 + 2 + 4 + 8) + 2 * (1 + 2 + 4) = 75 pixels of 8 a latent, the decoder 1 + 6 * (1 + 2 + 4 + 8) +
(1 + 2 + 4) = 98."""

FRAMES_AT_ONCE = 4

PEAKS = {False: (9.7, 13.2), True: (11.8, 21.0)}
"""How many tensors of its widest kind (base_dim channels of FRAMES_AT_ONCE frames at the size of its first layers) the
encoder and the decoder hold at the most, by `is_residual`; counted on the meta device (tests/unit/test_vae.py)."""

MOST_TILES = 8
"""Along a side: what a tile sees is hardly smaller with more."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of the picture along one side, in latents: `first` to `last` of the whole, seen from `begin` to `end`."""

    first: int
    last: int
    begin: int
    end: int

    def seen(self, scale: int) -> slice:
        """What goes in, of a side with `scale` places a latent."""
        return slice(self.begin * scale, self.end * scale)

    def own(self, scale: int) -> slice:
        """What is kept, of the whole."""
        return slice(self.first * scale, self.last * scale)

    def kept(self, scale: int) -> slice:
        """What is kept, of what comes out of the tile."""
        return slice((self.first - self.begin) * scale, (self.last - self.begin) * scale)


def tiles_of(size: int, number: int, margin: int) -> list[Tile]:
    """A side of `size` latents in `number` parts, as even as can be."""
    ends = [size * i // number for i in range(number + 1)]
    return [Tile(first, last, max(0, first - margin), min(size, last + margin))
            for first, last in itertools.pairwise(ends)]


class _Features:
    """What the causal convolutions of a part of the VAE remember of the frames before."""

    def __init__(self, part: torch.nn.Module) -> None:
        self._kept: list[Any] = [None] * sum(isinstance(m, WanCausalConv3d) for m in part.modules())
        self._place = [0]

    def begin(self) -> dict[str, Any]:
        """What diffusers' layers take, for the next frames."""
        self._place = [0]
        return {"feat_cache": self._kept, "feat_idx": self._place}

    def convolve(self, conv: WanCausalConv3d, x: torch.Tensor) -> torch.Tensor:
        """A convolution that stands outside of diffusers' blocks."""
        place, self._place[0] = self._place[0], self._place[0] + 1
        before, self._kept[place] = self._kept[place], x[:, :, -2:].clone()
        if before is not None and x.shape[2] < 2:
            self._kept[place] = torch.cat([before[:, :, -1:], self._kept[place]], dim=2)
        return conv(x, before)


def tiles_for(vae: AutoencoderKLWan, size: Bucket, limit_bytes: float, *, decoding: bool = False) -> tuple[int, int]:
    """The tiles of height and width that compute least among those that stay within the limit; where none do, those
    that take least.
    """
    numbers = range(1, MOST_TILES + 1)
    choices = sorted(itertools.product(numbers, numbers),
                     key=lambda tiles: seen_latents(vae, size, tiles, decoding)[0])
    sizes = {tiles: bytes_needed(vae, size, tiles, decoding=decoding) for tiles in choices}
    return next((tiles for tiles in choices if sizes[tiles] <= limit_bytes), min(choices, key=lambda t: sizes[t]))


def bytes_needed(vae: AutoencoderKLWan, size: Bucket, tiles: tuple[int, int], *, decoding: bool = False) -> int:
    """About what encoding (or decoding) a video takes at the most, beside the VAE's weights: the largest tile, and the
    latent-sized features and the pixels of the whole.
    """
    own = vae.config
    base = (own.decoder_base_dim or own.base_dim) if decoding else own.base_dim
    _, largest = seen_latents(vae, size, tiles, decoding)
    num_latents = size.num_tokens(scale_of(vae) * (own.patch_size or 1))
    tile = PEAKS[own.is_residual][decoding] * base * FRAMES_AT_ONCE * largest * scale_of(vae) ** 2
    features = base * own.dim_mult[-1] * num_latents
    return int((tile + features) * vae.dtype.itemsize) + 3 * size.num_frames * size.height * size.width


def seen_latents(vae: AutoencoderKLWan, size: Bucket, tiles: tuple[int, int], decoding: bool) -> tuple[int, int]:
    """(the latents that all tiles see together, those that the largest tile sees), of one frame."""
    px, margin = scale_of(vae) * (vae.config.patch_size or 1), DECODER_MARGIN if decoding else ENCODER_MARGIN
    rows, columns = ([tile.end - tile.begin for tile in tiles_of(side // px, number, margin)]
                     for side, number in zip((size.height, size.width), tiles, strict=True))
    return sum(rows) * sum(columns), max(rows) * max(columns)


def scale_of(vae: AutoencoderKLWan) -> int:
    """Places a latent along a side, of what the VAE's own layers begin with (after its patches)."""
    return 2 ** (len(vae.config.dim_mult) - 1)


def pixel_size(vae: AutoencoderKLWan, shape_THW: Sequence[int]) -> Bucket:
    """The size in frames and pixels of latents of this shape."""
    t, h, w = shape_THW
    px = scale_of(vae) * (vae.config.patch_size or 1)
    return Bucket(1 + FRAMES_AT_ONCE * (t - 1), h * px, w * px)


def chunks(num_frames: int) -> Iterator[slice]:
    """The pixel frames of each latent frame."""
    yield slice(0, 1)
    for first in range(1, num_frames, FRAMES_AT_ONCE):
        yield slice(first, first + FRAMES_AT_ONCE)


def encode(vae: AutoencoderKLWan, pixels_BCFHW: torch.Tensor, tiles: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """The mode of the posterior, [B, C, T, h, w], of uint8 or float pixels in [-1, 1], in so many tiles of height and
    width.
    """
    encoder, patch, scale = vae.encoder, vae.config.patch_size or 1, scale_of(vae)
    *_, num_frames, height, width = pixels_BCFHW.shape
    size = height // (patch * scale), width // (patch * scale)
    features = None
    for rows, columns in itertools.product(*(tiles_of(s, n, ENCODER_MARGIN) for s, n in zip(size, tiles, strict=True))):
        memory = _Features(encoder)
        given = pixels_BCFHW[..., rows.seen(patch * scale), columns.seen(patch * scale)]
        for t, frames in enumerate(chunks(num_frames)):
            chunk = patchify(to_pixels(given[:, :, frames]).to(vae.dtype), patch)
            own = memory.begin()
            x = memory.convolve(encoder.conv_in, chunk)
            for block in encoder.down_blocks:
                x = block(x, **own)
            if features is None:
                features = x.new_empty(*x.shape[:2], 1 + num_frames // FRAMES_AT_ONCE, *size)
            features[:, :, t : t + 1, rows.own(1), columns.own(1)] = x[..., rows.kept(1), columns.kept(1)]
            del chunk, x
    assert features is not None, "there is at least one tile of one frame"
    memory, found = _Features(encoder), []
    for part in torch.split(features, 1, dim=2):
        x = encoder.mid_block(part, **memory.begin())
        found.append(memory.convolve(encoder.conv_out, encoder.nonlinearity(encoder.norm_out(x))))
    return vae.quant_conv(torch.cat(found, dim=2)).chunk(2, dim=1)[0]


def decode(vae: AutoencoderKLWan, latents_BCTHW: torch.Tensor, tiles: tuple[int, int] = (1, 1)
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels_BCFHW uint8, whether all of them were finite) of latents before normalisation, in so many tiles."""
    decoder, patch = vae.decoder, vae.config.patch_size or 1
    size, scale = latents_BCTHW.shape[3:], scale_of(vae)
    whole = pixel_size(vae, latents_BCTHW.shape[2:])
    memory, features = _Features(decoder), []
    for x in torch.split(vae.post_quant_conv(latents_BCTHW), 1, dim=2):
        own = memory.begin()
        features.append(decoder.mid_block(memory.convolve(decoder.conv_in, x), **own))
    pixels = torch.empty(len(latents_BCTHW), 3, whole.num_frames, whole.height, whole.width, dtype=torch.uint8,
                         device=latents_BCTHW.device)
    finite = torch.ones((), dtype=torch.bool, device=latents_BCTHW.device)
    for rows, columns in itertools.product(*(tiles_of(s, n, DECODER_MARGIN) for s, n in zip(size, tiles, strict=True))):
        memory = _Features(decoder)
        for t, frames in enumerate(chunks(whole.num_frames)):
            own, x = memory.begin(), features[t][..., rows.seen(1), columns.seen(1)]
            for block in decoder.up_blocks:
                x = block(x, **own, first_chunk=t == 0)
            x = memory.convolve(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))
            x = unpatchify(x[..., rows.kept(scale), columns.kept(scale)], patch).float()
            finite &= x.isfinite().all()
            pixels[:, :, frames, rows.own(patch * scale), columns.own(patch * scale)] = to_bytes(x)
    return pixels, finite


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Bytes of any shape as the models see them, float32 in [-1, 1]; what is floating point already stays."""
    return frames if frames.is_floating_point() else frames.float() / 127.5 - 1


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_pixels`; what is outside of [-1, 1] is cut off."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
