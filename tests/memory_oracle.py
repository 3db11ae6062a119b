"""Device memory of a training step, counted allocation by allocation: what wantrain.costs is held against.

The step is wantrain's own (models.fit, objective, AdamW), on fake tensors, which have sizes and no numbers, or on real
ones. Every storage that an operation makes counts from then until nothing refers to it. What kernels take inside
themselves is not seen: attention's workspace is costs' own, by the kernel's source.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.allocations import Allocations
from wantrain import flow
from wantrain.lora import Spec
from wantrain.models import block_operations, four_bits
from wantrain.models.block import BlockMemory, train_blocks
from wantrain.models.copies import LateCopies
from wantrain.models.encode import autocast, predict_velocity
from wantrain.models.fit import NewAdapter, fit
from wantrain.models.fun import class_of
from wantrain.models.quantised import QuantisedLinear, quantise
from wantrain.models.variants import Variant, diffusers_config
from wantrain.terms import TEXT_LEN, Bucket

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Step:
    """A training step of `rows` samples: what decides its memory."""

    variant: Variant
    bucket: Bucket
    rows: int = 1
    dtype: torch.dtype = torch.bfloat16
    targets: Sequence[str] = ("attn_ffn",)
    rank: int = 32
    kind: str = "lora"
    form: str = ""
    keep: str = "all"
    swap: int = 0
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes: of the frozen base wherever it lies; on the device of all that lasts between steps (base, adapter,
    gradients, moments), and at the peak.
    """

    base: int
    lasting: int
    peak: int


def counted(step: Step, fake: bool = True) -> Counted:
    """An update, then a micro-step whose gradients add to others; on `fake` tensors or on real ones."""
    model = transformer(step)
    with FakeTensorMode() if fake else nullcontext():
        fill(model)
        held = sum(t.nbytes for name, t in (*model.named_parameters(), *model.named_buffers()) if "lora_" not in name)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        with Allocations() as allocations, pytest.MonkeyPatch.context() as patch:
            patch.setattr(LateCopies, "host", allocations.elsewhere(LateCopies.host))
            patch.setattr(four_bits, "unpacked", unpacked)
            if fake:  # a fake operation costs as much, however small it is
                patch.setattr(block_operations, "_goes_in_parts", lambda x: False)
            if step.swap or step.offload:
                train_blocks(model, BlockMemory(step.keep, step.swap, step.offload), CPU)
            allocations.count([*model.parameters(), *model.buffers(), *(p.grad for p in trainable)])
            optimizer.step()
            lasting = allocations.alive
            backward(model, step)
    return Counted(held, lasting, allocations.peak)


def transformer(step: Step) -> torch.nn.Module:
    """The adapted transformer on the meta device, its dtypes as wantrain.models.base loads them."""
    kept = set(class_of(step.variant)._keep_in_fp32_modules)
    with torch.device("meta"):
        model = class_of(step.variant).from_config(diffusers_config(step.variant))
        if step.form == "nf4":
            put_in_four_bits(model)
        elif step.form:
            quantise(model, step.form, may_use_bytes=True)
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        dtype = torch.int8 if isinstance(layer, QuantisedLinear) and name.endswith(".weight") else step.dtype
        if not kept & set(name.split(".")):
            parameter.requires_grad_(False).data = parameter.data.to(dtype)
    model.requires_grad_(False).eval()
    fit(model, torch.device("cuda"), NewAdapter(step.targets, Spec(step.rank, step.rank, step.kind), 0),
        memory=BlockMemory(step.keep))
    return model


def put_in_four_bits(model: torch.nn.Module) -> None:
    """The bytes and scales that bitsandbytes would make, which need not be there for their sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four_bits, "fault", lambda form: None)
        quantise(model, "nf4")
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear):
            out, width = layer.out_features, layer.in_features
            layer.weight = layer.keep(torch.empty(out, width // 2, dtype=torch.int8),
                                      torch.empty(out, width // four_bits.RUN))


def unpacked(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the place of bitsandbytes' kernel, which writes straight into its answer."""
    return torch.empty(len(stored), 2 * stored.shape[1], dtype=dtype)


def fill(model: torch.nn.Module) -> None:
    """Zeros in the place of all that is on the meta device: numbers do not matter."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def backward(model: torch.nn.Module, step: Step) -> None:
    """Loss and gradient of one micro-batch, as wantrain.objective computes them."""
    variant, rows = step.variant, step.rows
    a, shape = variant.architecture, variant.latent_THW(step.bucket)
    latents = torch.zeros(rows, a.out_channels, *shape)
    sigma = torch.zeros(rows, shape[0]) if variant.task == "ti2v" else torch.zeros(rows)
    condition = {}
    if a.in_channels > a.out_channels:
        condition["channels"] = torch.zeros(rows, a.in_channels - a.out_channels, *shape)
    if a.image_dim:
        images = 2 if variant.task == "flf2v" else 1
        condition["image"] = torch.zeros(rows, images, (a.image_tokens or 257) // images, a.image_dim)
    if a.vace_layers:
        condition["vace"] = torch.zeros(rows, a.vace_in_channels, *shape)
    text = torch.zeros(rows, TEXT_LEN, a.text_dim, dtype=step.dtype)
    with autocast(CPU, step.dtype), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        predicted = predict_velocity(model, latents.to(step.dtype), sigma, text, condition)
    flow.loss_per_sample(predicted, latents).mean().backward()
