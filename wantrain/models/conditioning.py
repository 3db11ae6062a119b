"""What each task gives the transformer besides noisy latents and text: one function a task.

The cache, streaming and the sampler all call `encode` for what the VAE and the CLIP tower make of frames, and `arrange`
for how the transformer takes it, so that training and sampling cannot differ.

Sources: the official generate scripts of Wan2.1 (i2v, flf2v, vace) and Wan2.2 (ti2v), VideoX-Fun's control pipeline;
docs/facts.md, "Conditioning". Parity with diffusers' pipelines: tests/parity/test_tasks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPVisionModel, Wav2Vec2Model

from wantrain.models.encode import decode_latents, encode_frames, pad_text
from wantrain.models.loading import free_bytes
from wantrain.models.vae import to_pixels
from wantrain.models.variants import Task, Variant
from wantrain.terms import SOUND_RATE, WINDOW, Bucket

Frames = Mapping[str, torch.Tensor]
"""frames_FCHW uint8 by name: first and last (one frame each), control, control_mask, background, reference, face; and
camera [F, 16] (wantrain.data.cameras) and audio [samples] (wantrain.data.sound), float32.
"""

Condition = dict[str, torch.Tensor]
"""Of one sample: `channels` [C, T, H, W] behind the noisy latents, `image` [images, tokens, D] of CLIP, `vace`
[96, T, H, W], `pose` [C, T, H, W], `face` [3, F, S, S] uint8, `reference` [C, 1, H, W], `camera` [F, 16], `audio`
[states, D, F - 1]; `driving` [C, T, H, W] with `driving_image` [1, tokens, D] and `driving_text` [L, D]."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHITE = 255
STATES_A_SECOND, VIDEO_RATE = 50, 30
"""Of wav2vec2's hidden states; and what they are brought to before those of the frames are taken."""

@dataclass(frozen=True, slots=True)
class Encoders:
    """The models that turn frames into conditions. `image` is None where the variant has no CLIP tokens, `audio` where
    it does not hear. The VAE works in tiles where the whole picture would take more than is left of `gib` GiB, or of
    all that the device has.
    """

    vae: AutoencoderKLWan
    image: CLIPVisionModel | None
    gib: float | None = None
    audio: Wav2Vec2Model | None = None

    def latents(self, frames_FCHW: torch.Tensor) -> torch.Tensor:
        """encode.encode_frames within what is left now."""
        return encode_frames(self.vae, frames_FCHW, free_bytes(self.vae.device, self.gib))

    def frames(self, latents_CTHW: torch.Tensor) -> torch.Tensor:
        """encode.decode_latents within what is left now."""
        return decode_latents(self.vae, latents_CTHW, free_bytes(self.vae.device, self.gib))

    @torch.no_grad()
    def image_tokens(self, frames_FCHW: torch.Tensor | None, num_images: int) -> Condition:
        """{`image`: the last but one hidden states of each frame}, zeros where none is given; {} without a tower.

        The whole frame is squashed to the tower's square (bicubic, not antialiased), as the official code does;
        diffusers' processor would cut its sides off.
        """
        if self.image is None:
            return {}
        own = self.image.config
        if frames_FCHW is None:
            num_tokens = 1 + (own.image_size // own.patch_size) ** 2
            return {"image": torch.zeros(num_images, num_tokens, own.hidden_size)}
        pixels = frames_FCHW.to(self.image.device).float() / WHITE
        pixels = torch.nn.functional.interpolate(pixels, (own.image_size,) * 2, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        hidden = self.image(((pixels - mean) / std).to(self.image.dtype), output_hidden_states=True).hidden_states[-2]
        return {"image": hidden.float().cpu()}


    @torch.no_grad()
    def sound_states(self, samples: torch.Tensor, num_frames: int) -> torch.Tensor:
        """All hidden states of wav2vec2 at the time of each frame, [states, D, frames] float32 on the CPU.

        As the official code: the samples normed, the states' 50 a second brought to 30 by lines between them, and of
        these the one nearest to a frame's time; zeros behind the last.
        """
        assert self.audio is not None, "a task that hears has its encoder"
        given = samples.to(self.audio.device)
        given = (given - given.mean()) / (given.var(unbiased=False) + 1e-7).sqrt()
        states = torch.cat(self.audio(given[None], output_hidden_states=True).hidden_states).transpose(1, 2)
        length = int(states.shape[2] / STATES_A_SECOND * VIDEO_RATE)
        found = torch.nn.functional.interpolate(states, length, mode="linear", align_corners=True)
        times_s = np.arange(num_frames) * (len(samples) / SOUND_RATE / num_frames)
        places = torch.from_numpy(np.round(times_s * VIDEO_RATE).astype(int))
        return torch.nn.functional.pad(found, (0, max(0, int(places[-1]) + 1 - length)))[..., places].float().cpu()


def of_window(frames: Frames, bucket: Bucket) -> Frames:
    """Name a window's frames as `encode` knows them. From a single frame none is given: it would be the answer."""
    own = frames.get(WINDOW)
    rest = {name: value for name, value in frames.items() if name != WINDOW}
    if own is None or bucket.num_frames == 1:
        return rest
    return {**rest, "first": own[:1], "last": own[-1:]}


def encode(variant: Variant, encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Encode a window's frames as its task needs them, for the cache; every tensor is float32 on the CPU."""
    return ENCODE[variant.task](encoders, frames, bucket) if variant.task in ENCODE else {}


def encode_i2v(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Given first frame (image-to-video), or none: `channels` [4 + C, T, H, W] are mask and VAE latents of the frame
    followed by grey; `image` its CLIP tokens.
    """
    return _given_frames(encoders, {0: frames.get("first")}, bucket) | encoders.image_tokens(frames.get("first"), 1)


def encode_flf2v(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Given first and last frame: as image-to-video, with the tokens of both."""
    first, last = frames.get("first"), frames.get("last")
    both = torch.cat([first, last]) if first is not None and last is not None else None
    return _given_frames(encoders, {0: first, bucket.num_frames - 1: last}, bucket) | encoders.image_tokens(both, 2)


def _given_frames(encoders: Encoders, given: Mapping[int, torch.Tensor | None], bucket: Bucket) -> Condition:
    """Frames at their places, grey (0 in [-1, 1]) elsewhere, through the VAE as one video; before them their mask."""
    pixels_FCHW = torch.zeros(bucket.num_frames, 3, bucket.height, bucket.width)
    mask_F = torch.zeros(bucket.num_frames)
    for place, frame in given.items():
        if frame is not None:
            pixels_FCHW[place], mask_F[place] = to_pixels(frame[0]), 1
    latents_CTHW = encoders.latents(pixels_FCHW)
    return {"channels": torch.cat([fold_mask(mask_F[:, None, None].expand(-1, *latents_CTHW.shape[2:])), latents_CTHW])}


def fold_mask(mask_FHW: torch.Tensor) -> torch.Tensor:
    """The frames' mask, of the latents' size, as [4, T, H, W]: a latent frame has the values of its four; the first
    frame fills one alone.
    """
    four_of_each = torch.cat([mask_FHW[:1].expand(4, -1, -1), mask_FHW[1:]])
    return four_of_each.view(-1, 4, *mask_FHW.shape[1:]).transpose(0, 1).contiguous()


def encode_control(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Fun-Control: `control` latents, and the CLIP tokens of the first frame, which `arrange` may take back."""
    control = encoders.latents(frames["control"])
    return {"control": control} | encoders.image_tokens(frames.get("first"), 1)


def encode_control_reference(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Fun-Control from V1.1 on: the same, and the latents of a `reference`, zeros where there is none. CLIP sees the
    reference, where there is one, and then always.
    """
    condition = encode_control(encoders, frames, bucket)
    if "reference" not in frames:
        return condition | {"reference": torch.zeros_like(condition["control"][:, :1])}
    seen = encoders.image_tokens(frames["reference"], 1).get("image")
    return condition | {"reference": encoders.latents(frames["reference"])} | (
        {} if seen is None else {"reference_image": seen})


def encode_control_inpaint(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Fun-Control of Wan2.2: the same, and `given`, the first frame as image-to-video has it."""
    return encode_control_reference(encoders, frames, bucket) | _first_given(encoders, frames, bucket)


def encode_camera(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Fun-Camera: the cameras as they are, for their rays are larger than the video; CLIP tokens of the first frame."""
    return {"camera": frames["camera"]} | encoders.image_tokens(frames.get("first"), 1)


def encode_camera_inpaint(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Fun-Camera of Wan2.2: the same, and `given`, the first frame as image-to-video has it."""
    return encode_camera(encoders, frames, bucket) | _first_given(encoders, frames, bucket)


def _first_given(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    return {"given": _given_frames(encoders, {0: frames.get("first")}, bucket)["channels"]}


def encode_vace(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """VACE: `vace` [96, T, H, W] is what to keep of the control video and what to make anew (VAE of each), and the mask
    folded 8 x 8; a `reference` [C, 1, H, W] stands before them, and before the latents.

    Without a control video all is made anew from grey; without a mask all of the control video is only a guide.
    """
    size = (bucket.num_frames, 1, bucket.height, bucket.width)
    control, mask = frames.get("control"), frames.get("control_mask")
    pixels_FCHW = torch.zeros(size).expand(-1, 3, -1, -1) if control is None else to_pixels(control)
    mask_F1HW = torch.ones(size) if mask is None else (mask[:, :1].float() / WHITE).expand(size)  # red, as theirs
    new_F1HW = (mask_F1HW > 0.5).float()
    latents_CTHW = torch.cat([encoders.latents(pixels_FCHW * part) for part in (1 - new_F1HW, new_F1HW)])
    folded_CTHW = fold_pixels(mask_F1HW[:, 0], latents_CTHW.shape[1:])
    if "reference" not in frames:
        return {"vace": torch.cat([latents_CTHW, folded_CTHW])}
    reference_C1HW = encoders.latents(frames["reference"])
    before_C1HW = torch.cat([reference_C1HW, torch.zeros_like(reference_C1HW), torch.zeros_like(folded_CTHW[:, :1])])
    return {"vace": torch.cat([before_C1HW, torch.cat([latents_CTHW, folded_CTHW])], dim=1),
            "reference": reference_C1HW}


def encode_animate(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Wan-Animate: `pose` latents of the control video, the `face` as pixels, and a `reference` [C, 1, H, W] before the
    latents; `channels` [4 + C, 1 + T, H, W] are that reference, known, then grey, unknown. Given a `background`, then
    that: known but for what the control mask says to make anew, where another is replaced.
    """
    if "background" in frames:
        mask_FHW = frames["control_mask"][:, 0, ::8, ::8].expand(bucket.num_frames, -1, -1)  # nearest, red, as theirs
        rest = torch.cat([fold_mask(1 - mask_FHW / WHITE), encoders.latents(frames["background"])])
    else:
        rest = _given_frames(encoders, {}, bucket)["channels"]
    return _behind_reference(encoders, frames["reference"], rest) | {
        "pose": encoders.latents(frames["control"]), "face": frames["face"].movedim(0, 1).contiguous()}


def _behind_reference(encoders: Encoders, reference: torch.Tensor, rest_CTHW: torch.Tensor) -> Condition:
    """A reference before the latents, known, and its CLIP tokens; `rest_CTHW` are mask and latents of what follows."""
    reference_C1HW = encoders.latents(reference)
    known = torch.cat([torch.ones(4, *reference_C1HW.shape[1:]), reference_C1HW])
    return {"channels": torch.cat([known, rest_CTHW], dim=1), "reference": reference_C1HW,
            **encoders.image_tokens(reference, 1)}


def encode_animate2(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """Animate-2: a `reference` before the latents, with grey behind it, and a `driving` video with the CLIP tokens of
    its first frame. Its text is put beside it by `arrange`.
    """
    grey = _given_frames(encoders, {}, bucket)["channels"]
    seen = encoders.image_tokens(frames["control"][:1], 1)
    return _behind_reference(encoders, frames["reference"], grey) | {
        "driving": encoders.latents(frames["control"]), **({"driving_image": seen["image"]} if seen else {})}


def encode_speech(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """S2V: wav2vec2's states of the `audio` of all frames but one; the latents of a `reference`, where there is one;
    and the `pose` latents of a control video, one frame late as the sound is: all as DiffSynth trains it.
    """
    condition = {"audio": encoders.sound_states(frames["audio"], bucket.num_frames - 1)}
    if "reference" in frames:
        condition["reference"] = encoders.latents(frames["reference"])
    if "control" in frames:
        poses_FCHW = frames["control"]
        condition["pose"] = encoders.latents(torch.cat([poses_FCHW[:1], poses_FCHW[:-1]]))[:, 1:]
    return condition


def without_prompt(condition: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The condition for guidance's call without the prompt: face and sound are left out with it, the rest stays; a
    transformer with a driving video is told.
    """
    if "driving" in condition:
        return {**condition, "unprompted": torch.ones(1)}
    return {name: torch.zeros_like(tensor) if name in ("face", "audio") else tensor
            for name, tensor in condition.items()}


def fold_pixels(mask_FHW: torch.Tensor, shape_THW: Sequence[int]) -> torch.Tensor:
    """A mask in pixels as [64, T, H, W]: the 8 x 8 pixels of each latent are channels, of the nearest frame each."""
    num_latent_frames, h, w = shape_THW
    folded = mask_FHW.view(len(mask_FHW), h, 8, w, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)
    return torch.nn.functional.interpolate(folded[None], (num_latent_frames, h, w), mode="nearest-exact")[0]


ENCODE: dict[Task, Callable[[Encoders, Frames, Bucket], Condition]] = {
    "i2v": encode_i2v, "flf2v": encode_flf2v, "control": encode_control, "control_reference": encode_control_reference,
    "control_inpaint": encode_control_inpaint, "camera": encode_camera, "camera_inpaint": encode_camera_inpaint,
    "vace": encode_vace, "animate": encode_animate, "animate2": encode_animate2, "s2v": encode_speech}
"""t2v and ti2v encode nothing more: ti2v's first latent frame is the clip's own."""


def arrange(variant: Variant, encoded: Condition, latents_CTHW: torch.Tensor, first: bool,
            text: Callable[[str], torch.Tensor]) -> tuple[Condition, torch.Tensor, torch.Tensor | None]:
    """(condition for the transformer, latents_CTHW, known_T) of a sample.

    `first`: whether the first latent frame of `latents_CTHW` is given, where the task leaves that open
    (Variant.leaves_first_open). A reference goes before the latents where the transformer has no place of its own for
    it; of S2V it is the first latent frame. `text` gives the features of the variant's own prompt, if it has one.
    known_T is 1 for latent frames that are given clean (Variant.first_is_clean).
    """
    first = latents_CTHW.shape[1] > 1 and (first or not variant.leaves_first_open)
    known_T = None
    if first and variant.first_is_clean:
        known_T = torch.zeros(latents_CTHW.shape[1])
        known_T[0] = 1
    if variant.task.startswith(("control", "camera")):
        return _of_fun(encoded, latents_CTHW, first), latents_CTHW, known_T
    condition = {name: tensor for name, tensor in encoded.items() if name != "reference"}
    if variant.architecture.speech:
        start = encoded.get("reference", latents_CTHW[:, :1])
        return {"pose": torch.zeros_like(latents_CTHW[:, 1:]), **condition}, torch.cat(
            [start, latents_CTHW[:, 1:]], dim=1), known_T
    if variant.second_prompt:
        condition["driving_text"] = pad_text(text(variant.second_prompt))
    if "reference" in encoded:
        latents_CTHW = torch.cat([encoded["reference"], latents_CTHW], dim=1)
    return condition, latents_CTHW, known_T


def _of_fun(encoded: Condition, latents_CTHW: torch.Tensor, first: bool) -> Condition:
    """What Fun's transformers take: `channels` of the control and of the first frame (zeros where that is not given),
    and the rest under its own name.
    """
    start = torch.zeros_like(latents_CTHW)
    if "given" in encoded:
        start = encoded["given"] * first
    elif first:
        start[:, :1] = latents_CTHW[:, :1]
    condition = {name: tensor for name, tensor in encoded.items() if name in ("reference", "camera")}
    if "image" in encoded:
        condition["image"] = encoded.get("reference_image", encoded["image"] * first)
    return condition | {"channels": torch.cat([*([encoded["control"]] if "control" in encoded else []), start])}
