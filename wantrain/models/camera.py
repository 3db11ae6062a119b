"""A camera's rays: for each pixel of a frame the line that it sees, in six numbers (Plücker coordinates).

Source: VideoX-Fun `videox_fun/data/utils.py` (`ray_condition`); docs/facts.md, "Cameras".
"""

from __future__ import annotations

import torch


def rays(cameras_BF16: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, 24, T, H, W] float32, in pixels: moment and direction of each ray, those of a latent's four frames as
    channels (the first frame stands for four).

    A camera is its focal lengths and its centre, as shares of width and height (fx, fy, cx, cy), and the 3 x 4 matrix
    that takes it to the place of the first one (wantrain.data.cameras.read).
    """
    cameras, device = cameras_BF16.float(), cameras_BF16.device
    fx, fy, cx, cy = (cameras[..., i, None, None] * side for i, side in enumerate((width, height, width, height)))
    y, x = (torch.arange(side, device=device) + 0.5 for side in (height, width))
    across, down = ((x - cx) / fx).expand(-1, -1, height, -1), ((y[:, None] - cy) / fy).expand(-1, -1, -1, width)
    seen = torch.nn.functional.normalize(torch.stack([across, down, torch.ones_like(across)], dim=-1), dim=-1)
    places = cameras[..., 4:].reshape(*cameras.shape[:2], 3, 4)
    directions = torch.einsum("bfij,bfhwj->bfhwi", places[..., :3], seen)
    origins = places[..., 3][:, :, None, None].expand_as(directions)
    lines_BFHW6 = torch.cat([torch.linalg.cross(origins, directions), directions], dim=-1)
    whole = torch.cat([lines_BFHW6[:, :1].expand(-1, 4, -1, -1, -1), lines_BFHW6[:, 1:]], dim=1)
    fours = whole.reshape(len(whole), -1, 4, height, width, 6)
    return fours.permute(0, 5, 2, 1, 3, 4).flatten(1, 2)
