"""The modules that Wan-Fun adds to Wan, on diffusers' transformer: each under its official name.

Source: VideoX-Fun; docs/facts.md, "Variants". tests/parity/test_fun.py holds both classes against another forward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional

from wantrain.models.camera import rays
from wantrain.models.driven import WanDrivenTransformer3DModel, edited
from wantrain.models.speech import WanSpeechTransformer3DModel
from wantrain.models.variants import Variant


class WanFunControlTransformer3DModel(WanTransformer3DModel):  # type: ignore[misc]
    """With `ref_conv`, which makes a frame of tokens of a reference's latents. They stand before those of the video, at
    the first place in time, and are taken away again at the end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patches = self.patch_embedding
        self.ref_conv = torch.nn.Conv2d(self.config.out_channels, patches.out_channels, patches.kernel_size[1:],
                                        patches.stride[1:])

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *, reference_hidden_states: torch.Tensor,
                **rest: Any) -> tuple[torch.Tensor]:
        """As diffusers' with return_dict=False; reference_hidden_states [B, C, 1, H, W], zeros where there is none."""
        reference = self.ref_conv(reference_hidden_states.squeeze(2)).unsqueeze(2)
        if timestep.ndim == 2:  # one a token: the reference is told that of the last one
            timestep = torch.cat([timestep[:, -1:].expand(-1, reference[0, 0].numel()), timestep], dim=1)
        longer = functional.pad(hidden_states, (0, 0, 0, 0, 1, 0))
        with edited(self.patch_embedding, lambda tokens: torch.cat([reference, tokens[:, :, 1:]], dim=2)):
            output, = super().forward(longer, timestep, **rest)
        return (output[:, :, 1:],)


class WanFunCameraTransformer3DModel(WanTransformer3DModel):  # type: ignore[misc]
    """With `control_adapter`, whose tokens of the camera's rays are added to those of the video."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A pixel of latents is 8 x 8 of the 2.1 VAE, with its 16 channels, and 16 x 16 of the 2.2 one, with 48.
        self.control_adapter = CameraAdapter(self.patch_embedding, 8 if self.config.out_channels == 16 else 16)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *, camera_hidden_states: torch.Tensor,
                **rest: Any) -> tuple[torch.Tensor]:
        """As diffusers' with return_dict=False; camera_hidden_states [B, F, 16] are cameras of every frame, as
        wantrain.models.camera.rays takes them.
        """
        px = self.control_adapter.px
        height, width = (px * side for side in hidden_states.shape[3:])
        added = self.control_adapter(rays(camera_hidden_states, height, width).to(hidden_states.dtype))
        with edited(self.patch_embedding, lambda tokens: tokens + added):
            output, = super().forward(hidden_states, timestep, **rest)
        return (output,)


class CameraAdapter(torch.nn.Module):
    """VideoX-Fun's SimpleAdapter: the pixels of a latent as channels, a convolution to patches, a residual block."""

    def __init__(self, patches: torch.nn.Conv3d, px: int) -> None:
        super().__init__()
        self.px, dim = px, patches.out_channels
        self.conv = torch.nn.Conv2d(24 * px * px, dim, patches.kernel_size[2], patches.stride[2])
        self.residual_blocks = torch.nn.Sequential(CameraBlock(dim))

    def forward(self, rays_BCTHW: torch.Tensor) -> torch.Tensor:
        """[B, 24, T, H, W] in pixels -> [B, D, T, H, W] in patches."""
        frames = functional.pixel_unshuffle(rays_BCTHW.transpose(1, 2).flatten(0, 1), self.px)
        made: torch.Tensor = self.residual_blocks(self.conv(frames))
        return made.reshape(len(rays_BCTHW), -1, *made.shape[1:]).transpose(1, 2)


class CameraBlock(torch.nn.Module):
    """Two convolutions whose answer is added to what they are given."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """[B, D, H, W] -> [B, D, H, W]."""
        found: torch.Tensor = given + self.conv2(self.conv1(given).relu())
        return found


_PLAIN = (WanFunControlTransformer3DModel, WanFunCameraTransformer3DModel, WanDrivenTransformer3DModel)
for _own in _PLAIN:  # diffusers reads the names of a config's keys from the signature
    functools.update_wrapper(_own.__init__, WanTransformer3DModel.__init__)
OWN = {own.__name__: own for own in (*_PLAIN, WanSpeechTransformer3DModel)}
"""Our classes by name."""


def class_of(variant: Variant) -> Any:
    """The class of the variant's transformer: diffusers', or one of OWN."""
    name = variant.transformer_class
    return OWN[name] if name in OWN else getattr(diffusers, name)
