"""AutoencoderKLWan over all frames at once, for training: the same submodules, no feature cache.

diffusers encodes and decodes in chunks (1 frame, then 4 at a time) with a cache of past features. All its convolutions
are causal, so one pass over all frames gives the same numbers, provided that the first frame goes around the temporal
resamplers. A clip of one frame is cheaper still: behind causal zero padding only the last temporal tap sees it.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor
from torch.nn import functional


def encode_moments(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> Tensor:
    """Mean and log variance, (B, 2 * z_dim, T, h, w), of pixels in [-1, 1]. Equals `vae.encode(...).latent_dist`."""
    encoder: WanEncoder3d = vae.encoder
    x = _conv(encoder.conv_in, patchify(pixels_BCFHW, vae.config.patch_size))
    for block in encoder.down_blocks:
        shortcut = block.avg_shortcut(x)
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        if block.downsampler is not None:
            x = _downsample(block.downsampler, x)
        x = x + shortcut
    x = _middle(encoder.mid_block, x)
    x = _conv(encoder.conv_out, encoder.nonlinearity(_norm(encoder.norm_out, x)))
    return _conv(vae.quant_conv, x)


def decode(vae: AutoencoderKLWan, z_BCTHW: Tensor) -> Tensor:
    """pixels_BCFHW, unclamped, of latents before normalisation. Clamped to [-1, 1] it equals `vae.decode(...)`."""
    decoder: WanDecoder3d = vae.decoder
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, _conv(vae.post_quant_conv, z_BCTHW)))
    for block in decoder.up_blocks:
        before = x
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        if block.upsampler is not None:
            x = _upsample(block.upsampler, x)
        if block.avg_shortcut is not None:
            x = x + block.avg_shortcut(before, first_chunk=True)
    x = _conv(decoder.conv_out, decoder.nonlinearity(_norm(decoder.norm_out, x)))
    return unpatchify(x, vae.config.patch_size)


def _conv(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    if x.shape[2] > 1 or conv.kernel_size[0] == 1:
        return conv(x)
    pad = (conv._padding[2], conv._padding[0])
    return functional.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=pad)[:, :, None]


def _norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return functional.normalize(x, dim=1) * (norm.scale * norm.gamma)


def _resnet(block: WanResidualBlock, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, torch.nn.Identity) else _conv(block.conv_shortcut, x)
    x = _conv(block.conv1, block.nonlinearity(_norm(block.norm1, x)))
    return shortcut + _conv(block.conv2, block.nonlinearity(_norm(block.norm2, x)))


def _middle(block: torch.nn.Module, x: Tensor) -> Tensor:
    x = _resnet(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _resnet(resnet, attention(x))
    return x


def _each_frame(layers: torch.nn.Module, x: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    x = layers(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return x.unflatten(0, (batch, frames)).transpose(1, 2)


def _downsample(resample: WanResample, x: Tensor) -> Tensor:
    x = _each_frame(resample.resample, x)
    if resample.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], resample.time_conv(x)], 2)
    return x


def _upsample(resample: WanResample, x: Tensor) -> Tensor:
    if resample.mode == "upsample3d" and x.shape[2] > 1:
        later = resample.time_conv(x[:, :, 1:])  # two halves of the channels: the even and the odd frames
        later = torch.stack(later.chunk(2, 1), 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], 2)
    return _each_frame(resample.resample, x)
