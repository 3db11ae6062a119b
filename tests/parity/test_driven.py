"""Animate-2 against diffusers' class of it, whose passes, packing and mask are its own, and against what diffusers'
modular pipeline makes of its inputs; and its files, under every naming, told from image-to-video's.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanAnimate2Transformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_animate_2_transformer_to_diffusers
from diffusers.models.transformers import transformer_wan_animate_2 as theirs
from diffusers.modular_pipelines.wan_animate_2 import denoise, encoders
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests import tiny_models as tiny
from tests.conftest import moving_square
from tests.tiny_tasks import CLIP, random
from wantrain import config as schema
from wantrain.lora import Spec
from wantrain.models import conditioning
from wantrain.models.block import BlockMemory
from wantrain.models.containers import open_container
from wantrain.models.detection import Detection, detect
from wantrain.models.encode import predict_velocity
from wantrain.models.fit import NewAdapter, fit
from wantrain.models.fun import class_of
from wantrain.models.loading import empty_weights, load_into
from wantrain.models.names import transformer_rename, transformer_to_official
from wantrain.models.variants import VARIANTS, Variant, diffusers_config
from wantrain.terms import Bucket, UserError

NUM_FRAMES, HEIGHT, WIDTH = 3, 4, 6
CPU = torch.device("cpu")


def variant_of(num_layers: int) -> Variant:
    """The tiny twin with an image embedding as wide as diffusers' class has it."""
    tiny_twin = VARIANTS["tiny_wan_animate2"]
    return replace(tiny_twin, architecture=replace(tiny_twin.architecture, image_dim=1280, num_layers=num_layers))


def diffusers_own(variant: Variant) -> WanAnimate2Transformer3DModel:
    a = variant.architecture
    return random(WanAnimate2Transformer3DModel(
        dim=a.dim, ffn_dim=a.ffn_dim, freq_dim=a.freq_dim, text_dim=a.text_dim, num_heads=a.num_heads,
        num_layers=a.num_layers), 3)


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of the official file, in which each block is `blocks.N.block`."""
    back = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img",
            "norm_added_k": "norm_k_img"}
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            rest = ".".join(parts[2:])
            for own, other in back.items():
                rest = rest.replace(f"attn.{own}.", f"attn.{other}.")
            found[f"blocks.{parts[1]}.block.{rest}"] = tensor
        else:
            found[name] = tensor
    return found


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ComfyUI has them: those of image-to-video."""
    return {name.replace(".block.", "."): tensor for name, tensor in official(state).items()}


@pytest.fixture
def dense(monkeypatch):
    """diffusers' flex attention, which is for a GPU, by the plain formula over its own mask, packed as it packs."""

    def block_mask(logic, Q_LEN: int, KV_LEN: int, **rest: object) -> torch.Tensor:
        return logic(0, 0, torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)[None])

    def attend(query, key, value, attn_mask=None, **rest: object) -> torch.Tensor:
        q, k, v = (one.transpose(1, 2) for one in (query, key, value))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(theirs, "create_block_mask", block_mask)
    monkeypatch.setattr(theirs, "dispatch_attention_fn", attend)


def asked(model: WanAnimate2Transformer3DModel, given: dict[str, torch.Tensor], timestep: torch.Tensor, i: int,
          unprompted: bool = False) -> torch.Tensor:
    """diffusers' two passes for sample `i`, as its pipeline makes them."""
    cache, driving = theirs.WanAnimate2KVCache(model.config.num_layers), given["driving"][i]
    grid = torch.tensor([[NUM_FRAMES, HEIGHT // 2, WIDTH // 2]])
    mask = encoders.get_i2v_mask(NUM_FRAMES, HEIGHT, WIDTH, 4 * NUM_FRAMES - 3, device="cpu")
    tokens = NUM_FRAMES * HEIGHT * WIDTH // 4
    model([driving], timestep[i : i + 1], [given["driving_text"][i]], [torch.cat([mask, driving])], cache, "extract",
          tokens, encoder_hidden_states_image=given["driving_image"][i], offset_grid_sizes=grid)
    return model([given["noisy"][i]], timestep[i : i + 1], [given["text"][i]], [given["channels"][i]], cache, "cached",
                 tokens + HEIGHT * WIDTH // 4, encoder_hidden_states_image=given["image"][i],
                 reference_grid_sizes=grid, origin_len=4 * NUM_FRAMES - 3, origin_area=[8 * HEIGHT, 8 * WIDTH],
                 is_uncondtion=unprompted).sample[0]


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"noisy": (16, 1 + NUM_FRAMES, HEIGHT, WIDTH), "channels": (20, 1 + NUM_FRAMES, HEIGHT, WIDTH),
              "driving": (16, NUM_FRAMES, HEIGHT, WIDTH), "text": (512, 128), "driving_text": (512, 128),
              "image": (1, 257, 1280), "driving_image": (1, 257, 1280)}
    return {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}


def ours(variant: Variant, state: dict[str, torch.Tensor], path: Path) -> torch.nn.Module:
    """Our transformer, loaded from a file of these names."""
    save_file(state, path)
    container = open_container(path)
    with empty_weights():
        module = class_of(variant).from_config(diffusers_config(variant))
    load_into(module, container, transformer_rename(container.names()), dtype=torch.float32)
    return module.requires_grad_(False).eval()


@pytest.mark.parametrize("unprompted", [False, True])
def test_both_streams_are_diffusers_two_passes(tmp_path, dense, unprompted):
    variant, given = variant_of(11), inputs()
    model = diffusers_own(variant)
    own = ours(variant, model.state_dict(), tmp_path / "own.safetensors")
    sigma = torch.tensor([0.3, 0.8])
    condition = {name: tensor for name, tensor in given.items() if name not in ("noisy", "text")}
    if unprompted:
        condition = conditioning.without_prompt(condition)
    with torch.no_grad():
        got = predict_velocity(own, given["noisy"], sigma, given["text"], condition)
        want = torch.stack([asked(model, given, 1000 * sigma, i, unprompted) for i in range(2)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        other = predict_velocity(own, given["noisy"], sigma, given["text"], condition | {
            "driving": given["driving"].flip(2)})
    assert (other - want).abs().mean() > 0.01, "the driving video is not heard"


def test_gradients_are_the_same_where_blocks_keep_their_inputs_alone():
    """Through both streams, a frame at a time: the derivative is that of the loss, taken by a small step."""
    variant, given, found = variant_of(2), inputs(), {}
    for keep in ("all", "inputs"):
        own = random(class_of(variant)(**diffusers_config(variant)), 3).requires_grad_(False)
        fit(own, CPU, NewAdapter([r".*attn1\.to_k"], Spec(rank=2, alpha=2), 0), memory=BlockMemory(keep))
        trained = [p for p in own.parameters() if p.requires_grad]
        for p in trained:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1

        def loss(own=own) -> torch.Tensor:
            return predict_velocity(own, given["noisy"], torch.tensor([0.3, 0.8]), given["text"], given).square().mean()

        found[keep] = torch.autograd.grad(loss(), trained)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    way = found["all"]
    steps = []
    for sign in (1, -1):
        for p, one in zip(trained, way, strict=True):
            p.data += sign * 1e-3 * one / one.norm() * (1 if sign == 1 else 2)
        steps.append(loss().item())
    assert (steps[0] - steps[1]) / 2e-3 == pytest.approx(sum(one.norm().item() for one in way), rel=0.02)


@functools.cache
def published() -> dict[str, torch.Tensor]:
    """Names and shapes of diffusers' class as it is published."""
    with torch.device("meta"):
        return WanAnimate2Transformer3DModel().state_dict()


def found_in(state: dict[str, torch.Tensor], name: str | None) -> Detection:
    return detect({name: tuple(tensor.shape) for name, tensor in state.items()}, name)


def test_every_published_naming_is_told_and_loads(tmp_path):
    own = VARIANTS["wan22_animate2_14b"]
    state = published()
    like = VARIANTS["wan21_i2v_14b_480p"]
    assert len(state) == like.num_tensors
    assert sum(tensor.numel() for tensor in state.values()) == like.num_parameters
    assert convert_wan_animate_2_transformer_to_diffusers(official(state)).keys() == state.keys(), "the official names"
    for named in (state, official(state)):
        told = found_in(named, "model.safetensors")
        assert told.resolve() == own
        assert told.candidates == told.fitting == ("wan22_animate2_14b",)
    assert found_in(plain(state), "wan_animate_2_bf16.safetensors").resolve() == own
    assert found_in(plain(state), "wan2.1_i2v_480p_14B_fp16.safetensors").resolve().name == "wan21_i2v_14b_480p"
    assert "wan22_animate2_14b" not in found_in(plain(state), "model.safetensors").candidates
    assert found_in(plain(state), "model.safetensors").resolve("wan22_animate2_14b") == own
    variant = variant_of(1)
    small = diffusers_own(variant).state_dict()
    want = ours(variant, small, tmp_path / "a.safetensors").state_dict()
    for i, named in enumerate((official(small), plain(small))):
        found = ours(variant, named, tmp_path / f"{i}.safetensors").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    for name, tensor in plain(small).items():
        assert torch.equal(next(t for n, t in want.items() if transformer_to_official(n) == name).flatten(),
                           tensor.flatten())


@pytest.mark.parametrize("name", ["wan_animate_2_distill_bf16.safetensors",
                                  "wan_animate_2_bf16_distillation.safetensors",
                                  "Wan2.2-Animate-2-14B-Distilled-Diffusers/transformer/model.safetensors"])
def test_the_distilled_one_is_refused_with_what_to_train_on(name):
    state = published()
    for named in (state, official(state), plain(state)):
        with pytest.raises(UserError, match="a distilled base") as refused:
            found_in(named, name).resolve()
        assert "train on wan22_animate2_14b, and sample with the few-step LoRA" in refused.value.message


@pytest.mark.parametrize(("memory", "key"), [
    (BlockMemory("all", offload=True), "memory.offload"), (BlockMemory("attention"), "memory.keep")])
def test_what_only_our_own_blocks_can_is_refused(memory, key):
    own = random(class_of(variant_of(1))(**diffusers_config(variant_of(1))), 3).requires_grad_(False)
    with pytest.raises(UserError, match=rf"{key} = .*: Animate-2, adapters other than"):
        fit(own, CPU, NewAdapter([r".*attn1\.to_k"], Spec(rank=2, alpha=2), 0), memory=memory)


def test_its_blocks_do_not_stream():
    with pytest.raises(UserError, match=r"memory\.swap = 1 is not allowed: 0 with tiny_wan_animate2"):
        schema.load(["recipe=demo_anime", "model.variant=tiny_wan_animate2", "memory.swap=1"])


def test_conditioning_is_that_of_diffusers_pipeline():
    """Its own blocks for the driving video, the reference and what stands behind that, of the first segment."""
    vae = random(AutoencoderKLWan(**tiny.VAES["2.1"]), 5).requires_grad_(False)
    tower = random(CLIPVisionModel(CLIPVisionConfig(**{**CLIP, "image_size": 224, "patch_size": 112})), 7)
    size, variant = (32, 48), VARIANTS["tiny_wan_animate2"]
    control, reference = moving_square(1, 9, *size), moving_square(2, 1, *size)
    got = conditioning.encode(variant, conditioning.Encoders(vae, tower.requires_grad_(False)),
                              {"control": control, "reference": reference}, Bucket(9, *size))

    class State:
        driving_video_pixels = control.movedim(0, 1).float()[None] / 127.5 - 1
        image_pixels = reference.float() / 127.5 - 1
        reference_image_latents = None
        effective_segment, segment_frame_length, prev_segment_conditioning_frames = 8, 9, 1

    class Parts:
        _execution_device, vae_scale_factor_spatial = CPU, 8

    Parts.vae, state = vae, State()
    reference_latents = encoders.encode_vae(vae, state.image_pixels.unsqueeze(2))[0]
    state.reference_image_latents = torch.cat([encoders.get_i2v_mask(1, 4, 6, 1, device="cpu"), reference_latents])
    for block in (denoise.WanAnimate2SegmentVaeEncoderStep(), denoise.WanAnimate2SegmentPrevFramesStep()):
        block(Parts, state, 0)
    torch.testing.assert_close(got["driving"], state.driving_video_latents[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["channels"], state.reference_latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["reference"], reference_latents, rtol=1e-5, atol=1e-5)
    for name, pixels in (("image", state.image_pixels[0]), ("driving_image", state.driving_video_pixels[0, :, 0])):
        want = encoders.clip_visual_encode(tower, pixels, CPU, torch.float32)
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-4)
    own = torch.ones(7, 5)
    arranged, latents, known = conditioning.arrange(variant, got, torch.zeros(16, 3, 4, 6), True, lambda text: {
        "人物动作的参考视频": own}[text])
    assert latents.shape[1] == 4
    assert known is None
    assert arranged["driving_text"].shape == (512, 5)
    assert arranged["driving_text"].sum() == own.sum()
