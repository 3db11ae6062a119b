"""What S2V adds to Wan, against a forward pass of our own in the official arithmetic and under the official names; its
weights from every layout that they are published in; what it hears, as the official code makes that.

`official` is written from Wan2.2 `wan/modules/s2v/` model_s2v.py, audio_utils.py, auxi_blocks.py and s2v_utils.py, and
`heard` from audio_encoder.py there (docs/facts.md, "Sound"), in float64 and with nothing of diffusers.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from tests import tiny_models as tiny
from tests.official import attention, heard, md5
from tests.tiny_tasks import WAV2VEC2, random, tone
from wantrain.lora import Spec
from wantrain.models import base, names, sizes
from wantrain.models.block import BlockMemory
from wantrain.models.conditioning import Encoders
from wantrain.models.containers import find_parts, open_container
from wantrain.models.detection import detect
from wantrain.models.fit import NewAdapter, fit
from wantrain.models.fun import class_of
from wantrain.models.inventory import AUDIO_ENCODER_PARAMETERS
from wantrain.models.loading import empty_weights, load_into
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.models.weight_files import ContainerError

Tensor = torch.Tensor
T, H, W = 2, 4, 6
"""Latent frames of the video, height and width."""
VARIANT = VARIANTS["tiny_wan_s2v"]


def twin(seed: int = 1) -> torch.nn.Module:
    return random(class_of(VARIANT)(**diffusers_config(VARIANT)), seed)


def inputs(batch: int = 2) -> dict[str, Tensor]:
    generator, own = torch.Generator().manual_seed(2), VARIANT.architecture

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    t = torch.tensor([900.0, 37.5])[:batch, None].repeat(1, (T + 1) * H * W // 4)
    t[:, : H * W // 4] = 0
    return {"hidden_states": draw(16, T + 1, H, W), "timestep": t, "encoder_hidden_states": draw(512, own.text_dim),
            "audio_hidden_states": draw(own.speech.audio_states, own.speech.audio_dim, 4 * T),
            "pose_hidden_states": draw(16, T, H, W)}


def tokens_of_sound(w: dict[str, Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """(the one for the norm, those for attention) of each latent frame."""
    own = "casual_audio_encoder"
    weights = functional.silu(w[f"{own}.weights"])[0, :, 0, 0]
    mixed = sum(states[:, i] * weight for i, weight in enumerate(weights)) / weights.sum()  # [B, D, F]
    mixed = torch.cat([mixed[..., :1]] * 73 + [mixed], -1)

    def conv(name: str, given: Tensor, stride: int = 1, rows: slice = slice(None)) -> Tensor:
        weight, bias = w[f"{own}.encoder.{name}.conv.weight"][rows], w[f"{own}.encoder.{name}.conv.bias"][rows]
        return torch.stack([bias + sum(given[..., max(0, i + k - 2)] @ weight[..., k].T for k in range(3))
                            for i in range(0, given.shape[-1], stride)], -1)

    def after(given: Tensor) -> Tensor:
        mean, var = given.mean(1, keepdim=True), given.var(1, unbiased=False, keepdim=True)
        return functional.silu((given - mean) / (var + 1e-6).sqrt())

    def rest(given: Tensor) -> Tensor:
        return after(conv("conv3", after(conv("conv2", after(given), 2)), 2)).transpose(1, 2)[:, 19:]

    whole = functional.linear(rest(conv("conv1_global", mixed)), w[f"{own}.encoder.final_linear.weight"],
                              w[f"{own}.encoder.final_linear.bias"])
    quarter = len(w[f"{own}.encoder.conv1_global.conv.bias"])
    several = [rest(conv("conv1_local", mixed, rows=slice(n * quarter, (n + 1) * quarter)))
               for n in range(VARIANT.architecture.speech.audio_tokens)]
    padding = w[f"{own}.encoder.padding_tokens"][0, 0].expand_as(several[0])
    return whole, torch.stack([*several, padding], 2)


def official(w: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """Tokens of the video first, the reference's behind them."""
    x, ref, t = given["hidden_states"][:, :, 1:], given["hidden_states"][:, :, :1], given["timestep"]
    text, states, pose = (given[f"{key}_hidden_states"] for key in ("encoder", "audio", "pose"))

    def linear(name: str, given: Tensor) -> Tensor:
        return functional.linear(given, w[f"{name}.weight"], w[f"{name}.bias"])

    def layer(given: Tensor, eps: float = 1e-6) -> Tensor:
        return functional.layer_norm(given, given.shape[-1:], eps=eps)

    def patches(name: str, given: Tensor) -> Tensor:
        return functional.conv3d(given, w[f"{name}.weight"], w[f"{name}.bias"], stride=(1, 2, 2)).flatten(2).mT

    own, heads = VARIANT.architecture, VARIANT.architecture.num_heads
    whole, local = tokens_of_sound(w, states)
    kinds, size = w["trainable_cond_mask.weight"], (T, H // 2, W // 2)
    video = patches("patch_embedding", x) + patches("cond_encoder", pose) + kinds[0]
    number = video.shape[1]
    x = torch.cat([video, patches("patch_embedding", ref) + kinds[1]], 1)
    places = [*product(*map(range, size)), *product([30], *map(range, size[1:]))]
    freq = w["time_embedding.0.weight"].shape[1] // 2
    angles = torch.stack([t, torch.zeros_like(t)], 1).double()[..., None] * 10000 ** (
        -torch.arange(freq, dtype=torch.float64) / freq)
    e = linear("time_embedding.2", functional.silu(linear("time_embedding.0", torch.cat(
        [angles.cos(), angles.sin()], -1))))
    e0 = linear("time_projection.1", functional.silu(e)).unflatten(-1, (6, -1))  # [B, 2, 6, D]
    context = linear("text_embedding.2", functional.gelu(linear("text_embedding.0", text), approximate="tanh"))
    for n in range(own.num_layers):
        both = w[f"blocks.{n}.modulation"][:, None] + e0
        m = torch.cat([both[:, :1].expand(-1, number, -1, -1),
                       both[:, 1:].expand(-1, x.shape[1] - number, -1, -1)], 1).unbind(2)
        own_x = layer(x) * (1 + m[1]) + m[0]
        x = x + attention(w, f"blocks.{n}.self_attn", heads, own_x, own_x, places=places) * m[2]
        given = functional.layer_norm(x, x.shape[-1:], w[f"blocks.{n}.norm3.weight"], w[f"blocks.{n}.norm3.bias"], 1e-6)
        x = x + attention(w, f"blocks.{n}.cross_attn", heads, given, context)
        given = functional.gelu(linear(f"blocks.{n}.ffn.0", layer(x) * (1 + m[4]) + m[3]), approximate="tanh")
        x = x + linear(f"blocks.{n}.ffn.2", given) * m[5]
        if n in own.speech.audio_layers:
            i = own.speech.audio_layers.index(n)
            frames = []
            for frame, part in enumerate(x[:, :number].chunk(T, 1)):
                shift, scale = linear(f"audio_injector.injector_adain_layers.{i}.linear", functional.silu(
                    whole[:, frame])).chunk(2, -1)
                normed = layer(part, 1e-5) * (1 + scale[:, None]) + shift[:, None]
                frames.append(part + attention(w, f"audio_injector.injector.{i}", heads, normed, local[:, frame]))
            x = torch.cat([*frames, x[:, number:]], 1)
    shift, scale = (w["head.modulation"] + e[:, :1]).chunk(2, 1)
    x = linear("head.head", layer(x[:, :number]) * (1 + scale) + shift)
    return x.view(len(x), *size, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), -1, T, H, W)


@pytest.mark.parametrize("by_token", [False, True])
def test_the_transformer_is_the_official_one(by_token: bool) -> None:
    module, given = twin(), inputs()
    w = {key: tensor.double() for key, tensor in tiny.official_transformer(module).items()}
    t = given["timestep"][:, -1]
    with torch.no_grad():
        answer, = module(**{**given, "timestep": given["timestep"] if by_token else t}, return_dict=False)
    wanted = official(w, {key: tensor.double() for key, tensor in {**given, "timestep": t}.items()})
    torch.testing.assert_close(answer[:, :, 1:].double(), wanted, rtol=1e-4, atol=1e-4)
    assert not answer[:, :, 0].any(), "the reference is no answer"
    assert wanted.std() > 0.1
    for key in ("audio_hidden_states", "pose_hidden_states", "hidden_states"):
        changed = given[key].clone()
        changed[:, :, 0] += 1  # of hidden_states the reference alone
        with torch.no_grad():
            other, = module(**{**given, key: changed}, return_dict=False)
        assert (other - answer)[:, :, 1:].abs().mean() > 1e-3, f"{key} is not heard"


@pytest.mark.parametrize("keep", ["all", "inputs"])
def test_our_blocks_give_the_gradients_of_diffusers_blocks(keep: str) -> None:
    """The attention to sound between blocks is computed again going backward, whatever these keep."""
    given, found = inputs(1), []
    for divided in (True, False):  # which takes diffusers' blocks
        module = twin()
        fit(module, torch.device("cpu"), NewAdapter(["all_linear"], Spec(2, 2, "lora"), 0), memory=BlockMemory(keep),
            is_divided=divided)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
        module.train()
        output, = module(**given, return_dict=False)
        output.square().mean().backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    assert any("audio_injector" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_weights_come_from_official_shards_and_from_the_file_of_comfyui(tmp_path: Path) -> None:
    """Official names both, which `inspect` and training tell from the tensors."""
    module = twin()
    weights = tiny.official_transformer(module)
    folder = tiny.sharded_folder(tmp_path / "official", weights)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel_S2V", "dim": 96}))
    (folder / "wav2vec2-large-xlsr-53-english").mkdir()
    parts = find_parts(folder)
    assert parts["audio_encoder"].name == "wav2vec2-large-xlsr-53-english"
    file = tiny.prefixed_file(tmp_path / "comfy", weights)
    for path in (parts["transformer"], file):
        container = open_container(path)
        found = detect(container.shapes(), "Wan2.2-S2V-14B", container.config)
        assert found.resolve() is VARIANT
        assert found.layout == "official"
        with empty_weights():
            own = class_of(VARIANT).from_config(diffusers_config(VARIANT))
        load_into(own, container, names.transformer_rename(container.names()), dtype=torch.float32)
        for name, tensor in module.state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor), name


# What it hears

def write_wav2vec2(folder: Path, *, old: bool = False) -> Path:
    """As transformers writes it; or with the names of before, as the published file has them."""
    random(Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC2)), 8).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    if old:
        file = folder / "model.safetensors"
        save_file({old_name(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


def old_name(name: str) -> str:
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v")


def loaded(folder: Path) -> Encoders:
    found = base.Base(VARIANT, {"audio_encoder": folder})
    return Encoders(None, None, audio=found.audio_encoder(torch.device("cpu")))  # type: ignore[arg-type]


@pytest.mark.parametrize("old", [False, True])
def test_a_frames_sound_is_what_the_official_code_hears(tmp_path: Path, old: bool) -> None:
    own = loaded(write_wav2vec2(tmp_path / "own", old=old))
    folder = write_wav2vec2(tmp_path / "whole")
    samples = tone(330, 0.5).astype(np.float32) / 32768
    found = own.sound_states(torch.from_numpy(samples), 8)
    assert found.shape == (3, 24, 8)
    torch.testing.assert_close(found, heard(folder, samples, 8), rtol=1e-4, atol=1e-4)
    assert found.std(-1).mean() > 0.01, "frames differ"
    late = own.sound_states(torch.from_numpy(samples[:4000]), 4)  # the last states end before the last frame does
    torch.testing.assert_close(late, heard(folder, samples[:4000], 4), rtol=1e-4, atol=1e-4)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    folder = write_wav2vec2(tmp_path / "own")
    about = folder / "preprocessor_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "sampling_rate": 8000}))
    with pytest.raises(ContainerError, match="gives 3 hidden states of 24 numbers at 8000 Hz, tiny_wan_s2v takes"):
        loaded(folder)
    about.unlink()
    assert loaded(folder).audio is not None
    Wav2Vec2ForCTC(Wav2Vec2Config(**{**WAV2VEC2, "num_hidden_layers": 3})).save_pretrained(folder)
    with pytest.raises(ContainerError, match="gives 4 hidden states"):
        loaded(folder)


def test_the_published_encoder_is_that_of_the_table() -> None:
    """The md5 is DiffSynth-Studio's of the public file (diffsynth/configs/model_configs.py, wans2v_audio_encoder)."""
    with torch.device("meta"):
        module = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes.WAV2VEC2_XLSR, vocab_size=33))
    shapes = {old_name(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert md5(shapes) == "06be60f3a4526586d8431cd038a71486"
    own = {name for name in shapes if names.wav2vec2_rename(())(name)}
    assert sum(math.prod(shapes[name]) for name in own) == AUDIO_ENCODER_PARAMETERS
