"""What Wan-Fun adds to Wan, against a forward pass of our own in the official arithmetic and under the official names.

`official` is written from VideoX-Fun `wan_transformer3d.py` and `wan_camera_adapter.py` (docs/facts.md, "Variants"), in
float64 and with nothing of diffusers.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests import tiny_models as tiny
from tests.official import attention
from tests.tiny_tasks import random
from wantrain.models.camera import rays
from wantrain.models.fun import class_of
from wantrain.models.variants import VARIANTS, diffusers_config

Tensor = torch.Tensor
T, H, W = 3, 4, 6
"""Latent frames, height and width."""


def official(w: dict[str, Tensor], heads: int, x: Tensor, t: Tensor, text: Tensor, *, image: Tensor | None = None,
             y_camera: Tensor | None = None, full_ref: Tensor | None = None) -> Tensor:
    """x [B, C, T, H, W]; t [B] or one a token [B, L]."""
    def linear(name: str, given: Tensor) -> Tensor:
        return functional.linear(given, w[f"{name}.weight"], w[f"{name}.bias"])

    def layer(given: Tensor) -> Tensor:
        return functional.layer_norm(given, given.shape[-1:], eps=1e-6)

    x = functional.conv3d(x, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
    size = x.shape[2:]
    if y_camera is not None:
        frames = y_camera.transpose(1, 2).flatten(0, 1)
        px = frames.shape[-1] // x.shape[-1] // 2
        b, c, h, width = frames.shape
        cells = frames.view(b, c, h // px, px, width // px, px).permute(0, 1, 3, 5, 2, 4).reshape(
            b, c * px * px, h // px, width // px)
        own = "control_adapter"
        made = functional.conv2d(cells, w[f"{own}.conv.weight"], w[f"{own}.conv.bias"], stride=2)
        one, two = (f"{own}.residual_blocks.0.conv{i}" for i in (1, 2))
        inner = functional.relu(functional.conv2d(made, w[f"{one}.weight"], w[f"{one}.bias"], padding=1))
        made = made + functional.conv2d(inner, w[f"{two}.weight"], w[f"{two}.bias"], padding=1)
        x = x + made.unflatten(0, (len(x), -1)).transpose(1, 2)
    x = x.flatten(2).transpose(1, 2)
    before = 0
    if full_ref is not None:
        reference = functional.conv2d(full_ref, w["ref_conv.weight"], w["ref_conv.bias"], stride=2)
        reference = reference.flatten(2).transpose(1, 2)
        before = reference.shape[1]
        x, size = torch.cat([reference, x], 1), (size[0] + 1, *size[1:])
        if t.ndim == 2:
            t = torch.cat([t[:, -1:].repeat(1, before), t], 1)
    freq = w["time_embedding.0.weight"].shape[1] // 2
    angles = t.double()[..., None] * 10000 ** (-torch.arange(freq, dtype=torch.float64) / freq)
    e = linear("time_embedding.2", functional.silu(linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()],
                                                                                        -1))))
    e = e if t.ndim == 2 else e[:, None]
    e0 = linear("time_projection.1", functional.silu(e)).unflatten(-1, (6, -1))
    context = linear("text_embedding.2", functional.gelu(linear("text_embedding.0", text), approximate="tanh"))
    if image is not None:
        given = functional.layer_norm(image, image.shape[-1:], w["img_emb.proj.0.weight"], w["img_emb.proj.0.bias"])
        given = linear("img_emb.proj.3", functional.gelu(linear("img_emb.proj.1", given)))
        image = functional.layer_norm(given, given.shape[-1:], w["img_emb.proj.4.weight"], w["img_emb.proj.4.bias"])
    places = list(product(*map(range, size)))
    for n in range(sum(name.endswith("norm3.weight") for name in w)):
        m = (w[f"blocks.{n}.modulation"][:, None] + e0).unbind(2)
        own = layer(x) * (1 + m[1]) + m[0]
        x = x + attention(w, f"blocks.{n}.self_attn", heads, own, own, places=places) * m[2]
        own = functional.layer_norm(x, x.shape[-1:], w[f"blocks.{n}.norm3.weight"], w[f"blocks.{n}.norm3.bias"], 1e-6)
        x = x + attention(w, f"blocks.{n}.cross_attn", heads, own, context, image=image)
        own = functional.gelu(linear(f"blocks.{n}.ffn.0", layer(x) * (1 + m[4]) + m[3]), approximate="tanh")
        x = x + linear(f"blocks.{n}.ffn.2", own) * m[5]
    shift, scale = (w["head.modulation"][:, None] + e.unsqueeze(2)).unbind(2)
    x = linear("head.head", layer(x) * (1 + scale) + shift)[:, before:]
    t_, h, width = size[0] - bool(before), *size[1:]
    return x.view(len(x), t_, h, width, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), -1, t_, 2 * h, 2 * width)


@pytest.mark.parametrize("name", ["tiny_wan_control_v11", "tiny_wan_control_a14b", "tiny_wan_control_5b",
                                  "tiny_wan_camera", "tiny_wan_camera_5b"])
@pytest.mark.parametrize("by_token", [False, True])
def test_the_transformer_is_the_official_one(name: str, by_token: bool) -> None:
    variant, generator = VARIANTS[name], torch.Generator().manual_seed(2)
    own = variant.architecture

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    module = random(class_of(variant)(**diffusers_config(variant)), 1)
    w = {key: tensor.double() for key, tensor in tiny.official_transformer(module).items()}
    x, text = draw(2, own.in_channels, T, H, W), draw(2, 512, own.text_dim)
    t = torch.tensor([[900.0], [37.5]]).expand(2, T * H * W // 4).clone()
    t[:, : H * W // 4] = 0
    t = t if by_token else t[:, -1]
    given: dict[str, Tensor] = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}
    more: dict[str, Tensor] = {}
    if own.image_dim:
        given["encoder_hidden_states_image"] = more["image"] = draw(2, 5, own.image_dim)
    if own.ref_conv:
        given["reference_hidden_states"] = draw(2, own.out_channels, 1, H, W)
        more["full_ref"] = given["reference_hidden_states"][:, :, 0]
    if own.control_adapter:
        px = variant.multiple_px // 2
        given["camera_hidden_states"] = torch.cat([0.5 + draw(2, 4 * T - 3, 4).abs(), draw(2, 4 * T - 3, 12)], -1)
        more["y_camera"] = rays(given["camera_hidden_states"], px * H, px * W)
    with torch.no_grad():
        answer, = module(**given, return_dict=False)
    wanted = official(w, own.num_heads, x.double(), t, text.double(), **{k: v.double() for k, v in more.items()})
    assert answer.shape == wanted.shape == (2, own.out_channels, T, H, W)
    torch.testing.assert_close(answer.double(), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.1
    for key in ("reference_hidden_states", "camera_hidden_states"):
        if key in given:  # it is heard
            with torch.no_grad():
                other, = module(**{**given, key: given[key] * 0.5}, return_dict=False)
            assert (other - answer).abs().mean() > 1e-3


def test_rays_are_those_of_each_pixel() -> None:
    """Pixel by pixel, as the definition has it: a ray through the pixel's middle, and the moment about the origin."""
    generator = torch.Generator().manual_seed(0)
    lens, place = (make((1, 5, n), generator=generator) for make, n in ((torch.rand, 4), (torch.randn, 12)))
    cameras = torch.cat([0.5 + lens, place], -1)
    height, width = 4, 6
    found = rays(cameras, height, width)
    assert found.shape == (1, 24, 2, height, width)
    for frame, (fx, fy, cx, cy, *matrix) in enumerate(cameras[0].double().tolist()):
        place = np.array(matrix).reshape(3, 4)
        for y, x in product(range(height), range(width)):
            seen = np.array([(x + 0.5 - cx * width) / (fx * width), (y + 0.5 - cy * height) / (fy * height), 1.0])
            direction = place[:, :3] @ (seen / np.linalg.norm(seen))
            wanted = [*np.cross(place[:, 3], direction), *direction]
            # The first latent holds the first frame four times, the next the four others: VideoX-Fun folds them so.
            slots = [(i, 0) for i in range(4)] if frame == 0 else [(frame - 1, 1)]
            for i, t in slots:
                assert found[0, i::4, t, y, x].tolist() == pytest.approx(wanted, abs=1e-5)
