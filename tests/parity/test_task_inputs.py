"""What the transformer is given at every training step, task by task, against a construction of our own.

`Official` below is written from docs/facts.md, "VAE", "Encoders" and "Conditioning", and from the official code
(Wan2.1 image2video, first_last_frame2video and vace, Wan2.2 textimage2video, VideoX-Fun's control pipeline) with the
raw VAE, CLIP tower and text encoder of the checkpoint, and without wantrain.models. Only frames, noise and sigma
come from wantrain's own functions, which have tests of their own.
"""

from __future__ import annotations

import itertools
import json
import wave
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, CLIPVisionModel, UMT5EncoderModel

from tests.conftest import moving_square
from tests.official import heard
from tests.tiny_tasks import write_checkpoint, write_sound
from wantrain import config as schema
from wantrain import flow, pictures
from wantrain.data.decode import read_clip
from wantrain.density import Density
from wantrain.models.variants import VARIANTS
from wantrain.recipe.clips import open_clips
from wantrain.recipe.recipe import Recipe, open_recipe
from wantrain.recipe.samples import Encoder, write_texts
from wantrain.recipe.training import Training, prepare
from wantrain.stages import train
from wantrain.terms import Batch, Bucket, Encoded, PlannedClip

CPU = torch.device("cpu")
NUM_FRAMES = 9
BATCH = 2

# docs/facts.md, "VAE"
MEAN_21 = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
           0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD_21 = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
          3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
STD_22 = tuple(0.5 + 0.02 * i for i in range(48))
"""Not the published ones, which test_variants.py checks: any that are not 1."""
MEAN_22 = tuple(0.03 * i - 0.7 for i in range(48))

# docs/facts.md, "Schedules", as the tiny twins have them: frames a second, shift, [low, high) of the experts.
FPS = {"tiny_wan_ti2v": 24, "tiny_wan_control_5b": 24, "tiny_wan_camera_5b": 24, "tiny_wan_animate": 30}
SHIFTS = {"tiny_wan": 3, "tiny_wan_a14b": 12, "tiny_wan_i2v": 3, "tiny_wan_i2v_a14b": 5, "tiny_wan_flf2v": 16,
          "tiny_wan_ti2v": 5, "tiny_wan_vace": 16, "tiny_wan_control": 3, "tiny_wan_control_v11": 3,
         "tiny_wan_control_5b": 5, "tiny_wan_camera": 3, "tiny_wan_camera_5b": 5, "tiny_wan_animate": 5,
          "tiny_wan_s2v": 3}
NEWER = ("tiny_wan_ti2v", "tiny_wan_control_5b", "tiny_wan_camera_5b")
"""Those with the 2.2 VAE."""
WITHIN = {("tiny_wan_a14b", "high"): (0.875, 1), ("tiny_wan_a14b", "low"): (0, 0.875),
          ("tiny_wan_i2v_a14b", "high"): (0.9, 1), ("tiny_wan_i2v_a14b", "low"): (0, 0.9)}


@dataclass(frozen=True)
class Official:
    """The tensors of one sample as the official code describes them."""

    checkpoint: Path
    fps: int
    memory: dict[object, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        own = AutoencoderKLWan.from_pretrained(self.checkpoint / "vae", torch_dtype=torch.float32)
        return own.requires_grad_(False).eval()

    @cached_property
    def tower(self) -> CLIPVisionModel:
        return CLIPVisionModel.from_pretrained(self.checkpoint / "image_encoder").requires_grad_(False).eval()

    @cached_property
    def text_encoder(self):
        return (AutoTokenizer.from_pretrained(self.checkpoint / "tokenizer"),
                UMT5EncoderModel.from_pretrained(self.checkpoint / "text_encoder", dtype=torch.float32)
                .requires_grad_(False).eval())

    def pixels(self, path: Path, num_frames: int, size: tuple[int, int], *, contain: bool = False) -> torch.Tensor:
        """CFHW in [-1, 1]."""
        frames = read_clip(path, 0.0, None, self.fps, Bucket(num_frames, *size), contain=contain)
        return frames.movedim(1, 0).float() / 127.5 - 1

    def latents(self, pixels_CFHW: torch.Tensor) -> torch.Tensor:
        """(mu - mean) / std of the posterior's moments: never sampled (docs/facts.md, "VAE")."""
        config = json.loads((self.checkpoint / "vae" / "config.json").read_text())
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        if len(mean) == 16 and not (self.checkpoint / "vae").is_symlink():
            mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN_21, STD_21))
        return (self.vae.encode(pixels_CFHW[None]).latent_dist.mean[0] - mean) / std

    def tokens(self, frame_CHW: torch.Tensor) -> torch.Tensor:
        """Squashed to the tower's square, CLIP's mean and std, all blocks but the last (docs/facts.md, "Encoders")."""
        side = self.tower.config.image_size
        square = torch.nn.functional.interpolate(frame_CHW[None], size=(side, side), mode="bicubic",
                                                 align_corners=False) * 0.5 + 0.5
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        parts = getattr(self.tower, "vision_model", self.tower)
        hidden = parts.pre_layrnorm(parts.embeddings((square - mean) / std))
        for block in parts.encoder.layers[:-1]:
            hidden = block(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden[0]

    def no_tokens(self) -> torch.Tensor:
        own = self.tower.config
        return torch.zeros(1 + (own.image_size // own.patch_size) ** 2, own.hidden_size)

    def clip(self, path: Path, num_frames: int, size: tuple[int, int], *, contain: bool = False) -> torch.Tensor:
        """Latents of a file's frames, each computed once."""
        key = (path, num_frames)
        if key not in self.memory:
            self.memory[key] = self.latents(self.pixels(path, num_frames, size, contain=contain))
        return self.memory[key]

    def text(self, caption: str) -> torch.Tensor:
        """512 rows, zeros beyond the prompt's own (docs/facts.md, "Encoders")."""
        if caption not in self.memory:
            self.memory[caption] = self._text(caption)
        return self.memory[caption]

    def _text(self, caption: str) -> torch.Tensor:
        tokenizer, encoder = self.text_encoder
        given = tokenizer(caption, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        hidden = encoder(given.input_ids, given.attention_mask).last_hidden_state[0]
        return hidden * given.attention_mask[0, :, None]

    def given_frames(self, pixels_CFHW: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """y of I2V and FLF2V: [mask 4 | latents of the given frames among grey ones]."""
        num_frames = pixels_CFHW.shape[1]
        video = torch.zeros_like(pixels_CFHW)
        for place in places:
            video[:, place] = pixels_CFHW[:, place]
        latents = self.latents(video)
        mask = torch.zeros(1, num_frames, *latents.shape[2:])
        mask[:, list(places)] = 1
        mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
        mask = mask.view(1, mask.shape[1] // 4, 4, *mask.shape[2:]).transpose(1, 2)[0]
        return torch.cat([mask, latents])

    def vace(self, pixels_CFHW: torch.Tensor | None, mask_FHW: torch.Tensor | None, reference_C1HW: torch.Tensor | None,
             shape_CFHW: tuple[int, ...]) -> torch.Tensor:
        """96 channels: what stays, what changes, the mask by 8 x 8 pixels; a reference first, with an empty mask."""
        video = torch.zeros(shape_CFHW) if pixels_CFHW is None else pixels_CFHW
        mask = torch.ones(shape_CFHW[1:]) if mask_FHW is None else mask_FHW
        changes = torch.where(mask > 0.5, 1.0, 0.0)
        latents = torch.cat([self.latents(video * (1 - changes)), self.latents(video * changes)])
        folded = torch.stack([mask[:, y::8, x::8] for y in range(8) for x in range(8)])
        times = [int((t + 0.5) * len(mask) / latents.shape[1]) for t in range(latents.shape[1])]  # nearest-exact
        whole = torch.cat([latents, folded[:, times]])
        if reference_C1HW is None:
            return whole
        first = self.latents(reference_C1HW)
        return torch.cat([torch.cat([first, torch.zeros_like(first), torch.zeros(64, *first.shape[1:])]), whole], dim=1)


class Direct:
    """Encodes in this process, each window and each caption once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.windows, self.texts = encoder, {}, {}

    def window(self, planned: PlannedClip) -> Encoded:
        if planned.name not in self.windows:
            self.windows[planned.name] = self.encoder.window(planned)
        return self.windows[planned.name]

    def text(self, caption: str) -> torch.Tensor:
        if caption not in self.texts:
            self.texts[caption] = self.encoder.text(caption)
        return self.texts[caption]


@dataclass(frozen=True)
class Step:
    """One micro-batch, what the model was called with and what it said, and the loss."""

    number: int
    batch: Batch
    given: dict[str, torch.Tensor]
    answer: torch.Tensor
    loss_B: torch.Tensor


@dataclass(frozen=True)
class Twin:
    """A tiny checkpoint's trainings over a few clips: `video_*` of nine frames and `picture`."""

    name: str
    checkpoint: Path
    recipe: Recipe
    trainings: dict[str | None, Training]
    source: Direct
    official: Official

    @property
    def size(self) -> tuple[int, int]:
        return (64, 96) if self.name in NEWER else (32, 48)

    def steps(self, first_frame_share: float = 0.5, expert: str | None = None, start: int = 0, end: int = 4
              ) -> list[Step]:
        """Steps of the training, recorded at the transformer's door."""
        training = self.trainings[expert]
        config = training.config
        config = replace(config, data=replace(config.data, first_frame_share=first_frame_share))
        training = replace(training, recipe=replace(training.recipe, config=config))
        made = []
        make = train.batch_maker(training, self.source, start)
        for number in range(start, end):
            for batch in make(number):
                made.append(record(training, number, batch))
        return made


def record(training: Training, number: int, batch: Batch) -> Step:
    told = []
    hooks = [training.model.register_forward_pre_hook(lambda _, args, kwargs: told.append((args, dict(kwargs))),
                                                      with_kwargs=True, prepend=True),
             training.model.register_forward_hook(lambda _, args, output: told.append(output))]
    with torch.no_grad():
        loss_B = training.losses(batch)
    for hook in hooks:
        hook.remove()
    (args, given), answer = told
    assert args == ()
    assert given.pop("return_dict") is False
    return Step(number, batch, given, answer[0], loss_B)


def write_medium(folder: Path, name: str, seed: int) -> None:
    """A film of a moving square, or a picture of one where the name says so."""
    if name == "picture":
        pictures.write_png(folder / "picture.png", moving_square(seed, 1, 64, 96)[0])
    else:
        pictures.write_mp4(folder / f"{name}.mp4", moving_square(seed, NUM_FRAMES, 64, 96), 16)


def write_world(folder: Path, task: str) -> Path:
    """video_0, video_1 and picture with captions; for control and VACE what goes with them."""
    names = ["guided", "masked", "with_both", "with_reference"] if task == "vace" else ["video_0", "video_1"]
    names += ["picture"] * (task != "s2v")  # which has no sound
    for number, name in enumerate(names):
        write_medium(folder, name, number)
        (folder / f"{name}.txt").write_text(f"a square of {'very ' * number}small size")
        if "control" in task or task == "animate" or (task == "vace" and name != "with_reference"):
            write_medium(folder / "control", name, 70 + number)
        if task == "animate":
            write_medium(folder / "face", name, 90 + number)
            pictures.write_png(folder / "reference" / f"{name}.png", moving_square(80 + number, 1, 40, 40)[0])
    if task == "s2v":
        write_spoken(folder)
    if "control_" in task:
        pictures.write_png(folder / "reference" / "video_0.png", moving_square(80, 1, 40, 40)[0])
    if "camera" in task:
        write_cameras(folder / "camera")
    if task == "animate":
        write_masks(folder / "control_mask", "video_0")
        for number, name in enumerate(("video_0", "picture")):
            write_medium(folder / "background", name, 60 + number)
    if task == "vace":
        write_masks(folder / "control_mask", "masked", "with_both")
        write_references(folder, "with_both", "with_reference")
    return folder


def write_references(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        pictures.write_png(folder / "reference" / f"{name}.png", moving_square(80 + number, 1, 40, 40)[0])


def write_spoken(folder: Path) -> None:
    """Sounds of two rates; a reference for one film, a pose for the other."""
    for number, rate in enumerate((16_000, 44_100)):
        write_sound(folder / "audio" / f"video_{number}.wav", 250 + 150 * number, rate=rate)
    pictures.write_png(folder / "reference" / "video_0.png", moving_square(80, 1, 40, 40)[0])
    write_medium(folder / "control", "video_1", 71)


def write_cameras(folder: Path) -> None:
    """Poses of one film, nine of them, with a move for the other and for the picture."""
    folder.mkdir()
    lines = [" ".join(map(str, [k, 0.6, 0.9, 0.5, 0.4, 0, 0, *np.concatenate(pose(k), 1).flatten()])) for k in range(9)]
    (folder / "video_0.txt").write_text("\n".join(["https://www.example.com", *lines]) + "\n")
    (folder / "video_1.txt").write_text("pan_left 0.5\n")
    (folder / "picture.txt").write_text("zoom_in 1\n")


def pose(k: int) -> tuple[np.ndarray, np.ndarray]:
    """From the world to the camera of frame k: it turns about y and moves."""
    c, s = np.cos(0.1 * k + 0.3), np.sin(0.1 * k + 0.3)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), np.array([[0.1 * k], [0.2], [0.03 * k * k]])


def write_masks(folder: Path, *names: str) -> None:
    """Masks of these films, which move and have greys on both sides of the middle, and a still one of the picture."""
    mask = torch.zeros(NUM_FRAMES, 3, 64, 96, dtype=torch.uint8)
    mask[:, :, 48:, :48], mask[:, :, 48:, 48:] = 100, 160
    for f in range(NUM_FRAMES):
        mask[f, :, 8:40, 8 * f : 8 * f + 24] = 255
    for name in names:
        pictures.write_mp4(folder / f"{name}.mp4", mask, 16)
    pictures.write_png(folder / "picture.png", mask[0])


def write_statistics(checkpoint: Path) -> None:
    """Give the random VAE mean and std that are seen; the embedded one has its own."""
    if not (checkpoint / "vae").is_symlink():
        path = checkpoint / "vae" / "config.json"
        config = json.loads(path.read_text())
        mean, std = (MEAN_21, STD_21) if config["z_dim"] == 16 else (MEAN_22, STD_22)
        path.write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}))


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made: dict[str, Twin] = {}

    def make(name: str) -> Twin:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            checkpoint = write_checkpoint(root / "checkpoint", name)
            write_statistics(checkpoint)
            task, size = VARIANTS[name].task, (64, 96) if name in NEWER else (32, 48)
            config = schema.load([
                "recipe=demo_anime", "tracker=none", f"model.variant={name}", f"model.path={checkpoint}",
                f"run.dir={root / 'run'}", f"data.cache_dir={root / 'cache'}", "~data.sources.regularisation",
                f"data.sources.style.path={write_world(root / 'clips', task)}", "data.heldout=null",
                "validation.every_steps=0", f"data.num_frames=[1,{NUM_FRAMES}]", f"data.resolutions=[{list(size)}]",
                f"data.batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "train.num_steps=100", "lora.rank=2",
                "lora.alpha=2", "data.num_workers=1", "sigma.distribution=uniform", "sigma.shift=null"])
            recipe = open_recipe(config)
            clips = open_clips(recipe, [])
            write_texts(recipe, clips.cache, clips.captions, CPU, True)
            trainings = {own.base.expert: prepare(own, clips) for own in recipe.trainings()}
            made[name] = Twin(name, checkpoint, recipe, trainings, Direct(Encoder(recipe, clips.cache, CPU)),
                              Official(checkpoint, FPS.get(name, 16)))
        return made[name]

    return make


def check(twin: Twin, step: Step, expert: str | None = None, exact: bool = True) -> None:
    """What holds for every task: noise, sigma, timestep, noisy latents, text and the loss."""
    batch, given = step.batch, step.given
    num_frames = batch.planned_B[0].bucket.num_frames
    assert given["encoder_hidden_states"].shape[:2] == (BATCH, 512)
    sigma_B = flow.draw_sigma(0, step.number, range(BATCH), BATCH, Density(
        shift=SHIFTS[twin.name], within=WITHIN.get((twin.name, expert), (0, 1))))
    assert given["timestep"].dtype == torch.float32
    noisy = given["hidden_states"]
    channels = 48 if twin.name in NEWER else 16
    num_latent_frames = 1 + (num_frames - 1) // 4
    before = noisy.shape[2] - num_latent_frames
    height, width = (x // (16 if twin.name in NEWER else 8) for x in twin.size)
    noise = flow.draw_noise(0, step.number, range(BATCH), (channels, num_latent_frames + before, height, width))
    losses = []
    for i, planned in enumerate(batch.planned_B):
        path = planned.clip.path
        clean = twin.official.clip(path, num_frames, twin.size)
        if before:
            reference = path.parent / "reference" / f"{path.stem}.png"
            clean = torch.cat([twin.official.clip(reference, 1, twin.size, contain=True), clean], 1)
        if "audio" in batch.condition and path.stem == "video_0":  # S2V: a reference in the place of the first frame
            reference = path.parent / "reference" / "video_0.png"
            clean = torch.cat([twin.official.clip(reference, 1, twin.size), clean[:, 1:]], 1)
        sigma_T = sigma_B[i].expand(clean.shape[1]).clone()
        if given["timestep"].ndim == 2 and (given["timestep"][i] == 0).any():
            sigma_T[0] = 0  # where: test_ti2v_...
        told = given["timestep"][i].expand(len(sigma_T) * height * width // 4)
        assert torch.equal(told, (1000 * sigma_T).repeat_interleave(height * width // 4))
        sigma_1T11 = sigma_T.view(1, -1, 1, 1)
        want = (1 - sigma_1T11) * clean + sigma_1T11 * noise[i]
        same(noisy[i, :channels], want, exact)
        same(given["encoder_hidden_states"][i], twin.official.text(path.with_suffix(".txt").read_text()), exact)
        error = (step.answer[i] - (noise[i] - clean)).square()
        losses.append(error[:, sigma_T > 0].mean())
    torch.testing.assert_close(step.loss_B, torch.stack(losses), rtol=1e-5, atol=1e-6)


def same(a: torch.Tensor, b: torch.Tensor, exact: bool = True) -> None:
    assert a.dtype == b.dtype == torch.float32
    if exact:
        assert a.shape == b.shape
        assert torch.equal(a, b), f"largest difference {(a - b).abs().max():.2e}"
    else:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def check_start(twin: Twin, step: Step, i: int, start: torch.Tensor, pixels: torch.Tensor, *,
                has_first: bool, shown: torch.Tensor | None = None) -> None:
    """What a later Fun is told of the first frame of sample `i`, where it has one, and of the picture `shown` to its
    image tower instead of that.
    """
    if twin.name in NEWER:
        assert (step.given["timestep"][i] == 0).any() == has_first
        same(start, twin.official.given_frames(pixels, [0] if has_first else []) * has_first, exact=False)
        return
    want = torch.zeros_like(start)
    if has_first:
        want[:, :1] = twin.official.latents(pixels[:, :1])
    same(start, want, exact=False)
    picture = shown if shown is not None else pixels if has_first else None
    tokens = twin.official.no_tokens() if picture is None else twin.official.tokens(picture[:, 0])
    same(step.given["encoder_hidden_states_image"][i], tokens, exact=False)


def kinds(steps: Sequence[Step]) -> set[int]:
    return {step.batch.planned_B[0].bucket.num_frames for step in steps}


@pytest.mark.parametrize(("name", "experts"), [("tiny_wan", (None,)), ("tiny_wan_a14b", ("high", "low"))])
def test_t2v_is_given_noisy_latents_and_text_alone(twins, name, experts):
    twin = twins(name)
    for expert in experts:
        steps = twin.steps(expert=expert)
        assert kinds(steps) == {1, NUM_FRAMES}
        for step in steps:
            check(twin, step, expert)
            assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states"}
            assert step.given["hidden_states"].shape[1] == 16


@pytest.mark.parametrize(("name", "experts"), [("tiny_wan_i2v", (None,)), ("tiny_wan_i2v_a14b", ("high", "low"))])
def test_i2v_is_given_mask_and_latents_of_the_first_frame_among_grey(twins, name, experts):
    twin = twins(name)
    has_tower = name == "tiny_wan_i2v"
    for expert in experts:
        steps = twin.steps(expert=expert)
        assert kinds(steps) == {1, NUM_FRAMES}
        for step in steps:
            check(twin, step, expert)
            assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states",
                                         *["encoder_hidden_states_image"] * has_tower}
            assert step.given["hidden_states"].shape[1] == 36
            for i, planned in enumerate(step.batch.planned_B):
                num_frames = planned.bucket.num_frames
                pixels = twin.official.pixels(planned.clip.path, num_frames, twin.size)
                places = [0] if num_frames > 1 else []  # a picture's only frame is what it learns to paint
                channels = step.given["hidden_states"][i, 16:]
                same(channels, twin.official.given_frames(pixels, places))
                assert channels[4:].abs().min() > 0, "zero latents are not latents of grey frames"
                if num_frames > 1:
                    assert channels[:4].flatten(2)[..., 0].T.tolist() == [[1] * 4, [0] * 4, [0] * 4]
                if has_tower:
                    want = twin.official.tokens(pixels[:, 0]) if places else twin.official.no_tokens()
                    same(step.given["encoder_hidden_states_image"][i], want, exact=False)


def test_flf2v_is_given_both_ends_and_the_tokens_of_both(twins):
    twin = twins("tiny_wan_flf2v")
    steps = twin.steps()
    assert kinds(steps) == {1, NUM_FRAMES}
    for step in steps:
        check(twin, step)
        tokens = step.given["encoder_hidden_states_image"]
        assert tokens.shape == (2 * BATCH, 5, 32), "diffusers folds two images of a sample into the batch"
        for i, planned in enumerate(step.batch.planned_B):
            num_frames = planned.bucket.num_frames
            pixels = twin.official.pixels(planned.clip.path, num_frames, twin.size)
            channels = step.given["hidden_states"][i, 16:]
            same(channels, twin.official.given_frames(pixels, [0, num_frames - 1] if num_frames > 1 else []))
            if num_frames > 1:
                assert channels[:4].flatten(2)[..., 0].T.tolist() == [[1] * 4, [0] * 4, [0, 0, 0, 1]]
            for k, frame in enumerate((pixels[:, 0], pixels[:, -1])):
                want = twin.official.tokens(frame) if num_frames > 1 else twin.official.no_tokens()
                same(tokens[2 * i + k], want, exact=False)


def test_ti2v_is_given_the_first_latent_frame_clean_and_told_so_by_its_tokens(twins):
    twin = twins("tiny_wan_ti2v")
    steps = twin.steps(first_frame_share=1)
    assert kinds(steps) == {1, NUM_FRAMES}
    for step in steps:
        check(twin, step, exact=True)
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states"}
        timestep, noisy = step.given["timestep"], step.given["hidden_states"]
        assert noisy.shape[1] == 48
        if step.batch.planned_B[0].bucket.num_frames == 1:
            assert (timestep > 0).all(), "a picture is not given to itself"
            continue
        tokens_of_a_frame = 2 * 3
        assert timestep.shape == (BATCH, 3 * tokens_of_a_frame)
        assert (timestep[:, :tokens_of_a_frame] == 0).all()
        assert (timestep[:, tokens_of_a_frame:] > 0).all()
        for i, planned in enumerate(step.batch.planned_B):
            frame = twin.official.pixels(planned.clip.path, NUM_FRAMES, twin.size)[:, :1]
            same(noisy[i, :, :1], twin.official.latents(frame), exact=False)  # as inference makes it: by itself


def test_ti2v_without_a_first_frame_is_text_to_video(twins):
    twin = twins("tiny_wan_ti2v")
    for step in twin.steps(first_frame_share=0):
        check(twin, step)
        assert (step.given["timestep"] > 0).all()


def test_a_batch_may_hold_samples_with_and_without_first_frame(twins):
    twin = twins("tiny_wan_ti2v")
    given = []
    for step in twin.steps(first_frame_share=0.5, end=8):
        check(twin, step)
        timestep = step.given["timestep"]
        given += [(timestep.view(BATCH, -1) == 0).any(1).tolist()] * (step.batch.planned_B[0].bucket.num_frames > 1)
    assert [True, False] in given or [False, True] in given


@pytest.mark.parametrize("share", [1, 0])
def test_fun_control_is_given_control_latents_and_the_first_frame_before_zeros(twins, share):
    twin = twins("tiny_wan_control")
    steps = twin.steps(first_frame_share=share)
    assert kinds(steps) == {1, NUM_FRAMES}
    for step in steps:
        check(twin, step)
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states",
                                     "encoder_hidden_states_image"}
        assert step.given["hidden_states"].shape[1] == 48
        for i, planned in enumerate(step.batch.planned_B):
            path, num_frames = planned.clip.path, planned.bucket.num_frames
            has_first = share == 1 and num_frames > 1
            control = twin.official.clip(path.parent / "control" / path.name, num_frames, twin.size)
            same(step.given["hidden_states"][i, 16:32], control)
            start, frame = step.given["hidden_states"][i, 32:], twin.official.pixels(path, num_frames, twin.size)[:, :1]
            want = twin.official.latents(frame) if has_first else torch.zeros_like(start[:, :1])
            same(start[:, :1], want, exact=not has_first)
            assert (start[:, 1:] == 0).all(), "zero latents, not latents of grey"
            tokens = twin.official.tokens(frame[:, 0]) if has_first else twin.official.no_tokens()
            same(step.given["encoder_hidden_states_image"][i], tokens, exact=False)


@pytest.mark.parametrize(("name", "share"), [("tiny_wan_control_v11", 1), *(
    pytest.param(name, share, marks=pytest.mark.slow) for name, share in (
        ("tiny_wan_control_v11", 0), ("tiny_wan_control_5b", 1), ("tiny_wan_control_5b", 0)))])
def test_later_fun_control_is_given_a_reference_or_zeros_beside_the_rest(twins, name, share):
    twin, seen = twins(name), set()
    for step in twin.steps(first_frame_share=share, end=8):
        check(twin, step)
        tower = ["encoder_hidden_states_image"] * (name == "tiny_wan_control_v11")
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states", "reference_hidden_states",
                                     *tower}
        c = 48 if name in NEWER else 16
        for i, planned in enumerate(step.batch.planned_B):
            path, num_frames = planned.clip.path, planned.bucket.num_frames
            has_first, own = share == 1 and num_frames > 1, step.given["hidden_states"][i]
            seen.add(path.stem)
            control, start = own[c : 2 * c], own[2 * c :]
            same(control, twin.official.clip(path.parent / "control" / path.name, num_frames, twin.size))
            pixels = twin.official.pixels(path, num_frames, twin.size)
            reference = path.parent / "reference" / f"{path.stem}.png"
            shown = twin.official.pixels(reference, 1, twin.size, contain=True) if reference.exists() else None
            latents = step.given["reference_hidden_states"][i]
            same(latents, torch.zeros_like(latents) if shown is None else twin.official.latents(shown), exact=False)
            check_start(twin, step, i, start, pixels, has_first=has_first, shown=shown)
    assert seen == {"video_0", "video_1", "picture"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_wan_camera", "tiny_wan_camera_5b"])
def test_fun_camera_is_given_the_cameras_of_its_frames_and_the_first_of_them(twins, name):
    """The film has 16 frames a second, of which a model of 24 sees some twice."""
    twin, seen, fps = twins(name), set(), FPS.get(name, 16)
    for step in twin.steps(first_frame_share=0, end=6):
        check(twin, step)
        tower = ["encoder_hidden_states_image"] * (name == "tiny_wan_camera")
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states", "camera_hidden_states",
                                     *tower}
        c = 48 if name in NEWER else 16
        for i, planned in enumerate(step.batch.planned_B):
            path, num_frames = planned.clip.path, planned.bucket.num_frames
            seen.add(path.stem)
            pixels, start = twin.official.pixels(path, num_frames, twin.size), step.given["hidden_states"][i, c:]
            check_start(twin, step, i, start, pixels, has_first=num_frames > 1)
            want = []
            for k in range(num_frames):
                # A move's lens is of 1280 x 720, of which a picture of 3 : 2 shows less of the sides.
                turn, way, lens = np.eye(3), np.zeros((3, 1)), [0.5 * (16 / 9) / 1.5, 0.5, 0.5, 0.5]
                if path.stem == "video_0":  # x_0 = R_0 R_k^T (x_k - t_k) + t_0
                    (first, t_0), (own, t_k) = pose(0), pose(k * 16 // fps)
                    turn, lens = first @ own.T, [0.6, 0.9, 0.5, 0.4]
                    way = t_0 - turn @ t_k
                elif path.stem == "video_1":
                    way = np.array([[-1.5 * 0.5 * k / num_frames], [0], [0]])
                want.append([*lens, *np.concatenate([turn, way], 1).flatten()])
            np.testing.assert_allclose(step.given["camera_hidden_states"][i], want, atol=1e-5)
    assert seen == {"video_0", "video_1", "picture"}


def test_vace_is_given_what_stays_what_changes_the_mask_and_the_reference_before(twins):
    twin = twins("tiny_wan_vace")
    steps = twin.steps(end=8)
    assert kinds(steps) == {1, NUM_FRAMES}
    seen = set()
    for step in steps:
        check(twin, step)
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states", "control_hidden_states"}
        assert step.given["hidden_states"].shape[1] == 16
        control = step.given["control_hidden_states"]
        for i, planned in enumerate(step.batch.planned_B):
            path, num_frames = planned.clip.path, planned.bucket.num_frames
            seen.add(path.stem)
            own = {kind: next(iter((path.parent / kind).glob(f"{path.stem}.*")), None)
                   for kind in ("control", "control_mask", "reference")}
            shape = (3, num_frames, *twin.size)
            pixels = own["control"] and twin.official.pixels(own["control"], num_frames, twin.size)
            mask = own["control_mask"] and (twin.official.pixels(own["control_mask"], num_frames, twin.size)[0] + 1) / 2
            reference = own["reference"] and twin.official.pixels(own["reference"], 1, twin.size, contain=True)
            want = twin.official.vace(pixels, mask, reference, shape)
            assert want.shape[0] == 32 + 64
            same(control[i], want, exact=False)
            if reference is not None:
                assert (control[i, 16:, 0] == 0).all()
                assert (reference[:, :, :, :8] == 1).all(), "a square reference stands on white"
                assert (reference[:, :, :, -8:] == 1).all()
    assert seen == {"guided", "masked", "with_both", "with_reference", "picture"}


def test_animate_is_given_its_reference_before_grey_or_before_a_background_and_its_mask(twins):
    twin, seen = twins("tiny_wan_animate"), set()
    for step in twin.steps(end=6):
        check(twin, step)
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states", "pose_hidden_states",
                                     "encoder_hidden_states_image", "face_pixel_values"}
        for i, planned in enumerate(step.batch.planned_B):
            path, num_frames = planned.clip.path, planned.bucket.num_frames
            seen.add(path.stem)
            own = {kind: next(iter((path.parent / kind).glob(f"{path.stem}.*")), None)
                   for kind in ("control", "face", "reference", "background", "control_mask")}
            reference = twin.official.pixels(own["reference"], 1, twin.size, contain=True)
            channels = step.given["hidden_states"][i, 16:]
            same(channels[:, :1], torch.cat([torch.ones(4, 1, 4, 6), twin.official.latents(reference)]))
            if own["background"]:
                same(channels[4:, 1:], twin.official.clip(own["background"], num_frames, twin.size))
                white = (twin.official.pixels(own["control_mask"], num_frames, twin.size)[0] + 1) / 2
                for k, t, y, x in itertools.product(range(4), range(1 + num_frames // 4), range(4), range(6)):
                    frame = max(0, 4 * t - 3 + k) if t else 0
                    assert abs(channels[k, 1 + t, y, x] - (1 - white[frame, 8 * y, 8 * x])) < 1e-6
                assert 0 < channels[:4, 1:].mean() < 1
            else:
                same(channels[:, 1:], twin.official.given_frames(torch.zeros(3, num_frames, *twin.size), []))
            same(step.given["pose_hidden_states"][i], twin.official.clip(own["control"], num_frames, twin.size))
            face = twin.official.pixels(own["face"], num_frames, (16, 16))
            same(step.given["face_pixel_values"][i], face, exact=False)
            same(step.given["encoder_hidden_states_image"][i], twin.official.tokens(reference[:, 0]), exact=False)
    assert seen == {"video_0", "video_1", "picture"}


@pytest.mark.parametrize("name", ["tiny_wan_i2v", "tiny_wan_flf2v", "tiny_wan_ti2v", "tiny_wan_vace",
                                  "tiny_wan_control", *(pytest.param(name, marks=pytest.mark.slow) for name in (
                                      "tiny_wan_control_5b", "tiny_wan_camera"))])
def test_a_sample_of_a_batch_computes_what_it_does_alone(twins, name):
    twin = twins(name)
    for step in twin.steps(end=3):
        batch = step.batch
        alone = []
        for i in range(BATCH):
            one = slice(i, i + 1)
            alone.append(record(twin.trainings[None], step.number, replace(
                batch, latents_BCTHW=batch.latents_BCTHW[one], text_BLD=batch.text_BLD[one],
                condition={name: tensor[one] for name, tensor in batch.condition.items()},
                known_BT=None if batch.known_BT is None else batch.known_BT[one], noise_BCTHW=batch.noise_BCTHW[one],
                sigma_B=batch.sigma_B[one], index_B=batch.index_B[one], planned_B=batch.planned_B[one])).loss_B)
        torch.testing.assert_close(step.loss_B, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_s2v_is_given_the_reference_clean_the_sound_of_every_frame_but_one_and_the_pose(twins):
    """A sound of another rate is heard at 16 kHz; without a reference the clip's own first frame stands for it."""
    twin = twins("tiny_wan_s2v")
    steps = twin.steps(end=3)
    assert kinds(steps) == {NUM_FRAMES}
    seen = set()
    for step in steps:
        check(twin, step)
        assert step.given.keys() == {"hidden_states", "timestep", "encoder_hidden_states", "audio_hidden_states",
                                     "pose_hidden_states"}
        for i, planned in enumerate(step.batch.planned_B):
            path = planned.clip.path
            seen.add(path.stem)
            each = twin.size[0] * twin.size[1] // 256
            assert not step.given["timestep"][i][:each].any()
            assert step.given["timestep"][i][each:].all()
            with wave.open(str(path.parent / "audio" / f"{path.stem}.wav")) as file:
                rate, data = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
            times = np.arange(NUM_FRAMES * 1000 - 1000) / 16_000
            samples = data[: len(times)] if rate == 16_000 else np.interp(times, np.arange(len(data)) / rate, data)
            wanted = heard(twin.checkpoint / "audio_encoder", samples.astype(np.float32), NUM_FRAMES - 1)
            torch.testing.assert_close(step.given["audio_hidden_states"][i], wanted, rtol=1e-4,
                                       atol=1e-4 if rate == 16_000 else 0.05)
            pose, control = step.given["pose_hidden_states"][i], path.parent / "control" / path.name
            want = torch.zeros_like(pose)
            if control.exists():
                pixels = twin.official.pixels(control, NUM_FRAMES, twin.size)
                want = twin.official.latents(torch.cat([pixels[:, :1], pixels[:, :-1]], 1))[:, 1:]
            same(pose, want, exact=False)
    assert seen == {"video_0", "video_1"}
