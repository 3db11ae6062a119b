"""Text shortened on the CPU against diffusers' plain forward over 512 tokens."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from wantrain import lora
from wantrain.models import base
from wantrain.models.short_text import shorten_text


def adapted():
    transformer = WanTransformer3DModel.from_pretrained(base.EMBEDDED / "transformer", dtype=torch.float32)
    lora.inject(transformer, ["attn_ffn"], lora.Spec(4, 4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable_parameters(transformer).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return transformer


@pytest.mark.parametrize("lengths", [(3, 11), (1, 1), (512, 4), (511, 510), (0, 0)])
def test_outputs_and_gradients_are_those_of_512_tokens(lengths):
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(2, 512, 128)
    for i, length in enumerate(lengths):
        text[i, :length] = torch.randn(length, 128, generator=generator)
    inputs = {"hidden_states": torch.randn(2, 16, 2, 4, 6, generator=generator), "timestep": torch.tensor([900.0, 3.5]),
              "encoder_hidden_states": text, "return_dict": False}
    plain, short = adapted(), adapted()
    shorten_text(short)
    seen = []
    short.blocks[0].attn2.to_k.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    want, got = plain(**inputs)[0], short(**inputs)[0]
    assert seen == [min(max(lengths) + 1, 512)]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    for out in (want, got):
        out.square().mean().backward()
    ours = dict(lora.trainable_parameters(short))
    for name, parameter in lora.trainable_parameters(plain).items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)
