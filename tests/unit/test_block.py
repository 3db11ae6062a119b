"""The blocks' own backward pass: diffusers' numbers and PEFT's gradients, whatever a block keeps."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from tests import tiny_models as tiny
from tests.cuda_autocast import CudaAutocast
from wantrain import lora
from wantrain.lora import Spec
from wantrain.models import block, fit
from wantrain.models.block import BlockMemory
from wantrain.models.block_operations import Attention
from wantrain.models.encode import autocast, predict_velocity
from wantrain.models.fit import NewAdapter
from wantrain.models.offload import Offload
from wantrain.models.swap import Swap, spread

Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]
CPU, NO_SHORT_TEXT = torch.device("cpu"), torch.device("cuda")
ALL = ["attn_ffn"]


def adapted(kind: str, targets: list[str], device: torch.device = CPU, spec: Spec | None = None) -> torch.nn.Module:
    """A tiny twin with an adapter that has an effect, with diffusers' own blocks."""
    transformer = copy.deepcopy(tiny.transformer(kind)).requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "train_blocks", lambda *_: None)
        fit.fit(transformer, device, NewAdapter(targets, spec or Spec(4, 8.0), 0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.trainable_parameters(transformer).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def passed(transformer: torch.nn.Module, kind: str, dtype: torch.dtype = torch.float32, by_token: bool = False
           ) -> Outcome:
    """The answer to two random samples, and the gradients of a random projection of it."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    config, condition = transformer.config, {}
    if config.image_dim:
        condition["image"] = random(2, 1, 257, config.image_dim)
    if kind == "vace":
        condition["vace"] = random(2, 96, 3, 8, 6)
    noisy, text = random(2, 16 if kind != "i2v" else config.in_channels, 3, 8, 6), random(2, 512, config.text_dim)
    text[:, 40:] = 0
    sigma = torch.rand(2, 3, generator=generator) if by_token else torch.tensor([0.5, 0.3])
    with autocast(CPU, dtype):
        answer = predict_velocity(transformer, noisy.to(dtype), sigma, text.to(dtype), condition)
    transformer.zero_grad()
    (answer.float() * random(*answer.shape)).sum().backward()
    return answer.detach(), {name: p.grad.clone() for name, p in lora.trainable_parameters(transformer).items()
                             if p.grad is not None}


def ours(transformer: torch.nn.Module, keep: str) -> torch.nn.Module:
    """The same transformer, from now on with our blocks."""
    block.train_blocks(transformer, BlockMemory(keep), CPU)
    return transformer


def assert_near(own: Outcome, plain: Outcome, tolerance: float, floor: float) -> None:
    """Each gradient within `tolerance` of its norm, and `floor` of the largest gradient's norm: some are differences of
    large numbers, and in them float32's own rounding is larger than they are.
    """
    assert (own[0] - plain[0]).norm() <= tolerance * plain[0].norm()
    assert own[1].keys() == plain[1].keys()
    largest = max(float(gradient.norm()) for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        assert (own[1][name] - gradient).norm() <= tolerance * gradient.norm() + floor * largest, name


@pytest.mark.parametrize(("kind", "targets", "device", "by_token"), [
    ("t2v", ALL, CPU, False), ("t2v", ALL, NO_SHORT_TEXT, True), ("t2v", ["all_linear"], CPU, False),
    ("t2v", ["all_linear"], CPU, True), ("i2v", ["all_linear"], CPU, False), ("vace", ["all_linear"], CPU, False),
    pytest.param("i2v", ALL, CPU, False, marks=pytest.mark.slow),
    pytest.param("vace", ALL, CPU, False, marks=pytest.mark.slow),
    ("t2v", [r"blocks\.1\.ffn\.net\.2"], CPU, False), ("t2v", [r"blocks\.1\.attn1\.to_q"], CPU, False),
    ("t2v", [r"blocks\.0\.ffn\.net\.0\.proj", r"blocks\.0\.attn2\.to_k"], CPU, False),
], ids=str)
def test_answers_and_gradients_are_those_of_diffusers_and_peft(kind: str, targets: list[str], device: torch.device,
                                                               by_token: bool) -> None:
    transformer = adapted(kind, targets, device)
    plain = passed(transformer, kind, by_token=by_token)
    whole = passed(ours(transformer, "all"), kind, by_token=by_token)
    assert_near(whole, plain, 1e-5, 2e-7)
    for keep in ("attention", "inputs"):
        spared = passed(ours(transformer, keep), kind, by_token=by_token)
        assert torch.equal(spared[0], whole[0])
        assert all(torch.equal(gradient, whole[1][name]) for name, gradient in spared[1].items())


@pytest.mark.parametrize(("kind", "lists"), [("t2v", nullcontext), ("i2v", nullcontext), ("t2v", CudaAutocast)])
def test_bfloat16_is_as_near_to_float32_as_autograd_is(kind: str, lists: Callable[[], AbstractContextManager[Any]]
                                                       ) -> None:
    """Also where autocast computes norms in float32, as on a GPU."""
    transformer = adapted(kind, ALL)
    exact = passed(transformer, kind)
    half = transformer.bfloat16()
    for parameter in lora.trainable_parameters(half).values():
        parameter.data = parameter.data.float()

    def distance(own: Outcome) -> float:
        return sum(float((own[1][name] - gradient).norm()) for name, gradient in exact[1].items())

    with lists():
        plain, own = passed(half, kind, torch.bfloat16), passed(ours(half, "attention"), kind, torch.bfloat16)
    assert own[0].dtype == plain[0].dtype
    assert distance(own) < 1.1 * distance(plain)


def test_a_gpus_autocast_is_what_is_emulated() -> None:
    x, norm = torch.randn(2, 8, dtype=torch.bfloat16), torch.nn.RMSNorm(8, elementwise_affine=False)
    with autocast(CPU, torch.bfloat16):
        assert norm(x).dtype == torch.nn.functional.layer_norm(x, [8]).dtype == x.sum().dtype == torch.bfloat16
        with CudaAutocast():
            assert norm(x).dtype == torch.nn.functional.layer_norm(x, [8]).dtype == x.sum().dtype == torch.float32
            assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16


def test_a_scale_and_a_switched_off_adapter_count() -> None:
    base, own = (adapted("t2v", ALL, NO_SHORT_TEXT, Spec(4, 1.0, "rslora")) for _ in range(2))
    assert_near(passed(ours(own, "all"), "t2v"), passed(base, "t2v"), 1e-5, 2e-7)
    with torch.no_grad(), lora.switched_off(base), lora.switched_off(own):
        given = {"hidden_states": torch.randn(1, 16, 3, 8, 6), "timestep": torch.tensor([500.0]), "return_dict": False,
                 "encoder_hidden_states": torch.randn(1, 512, base.config.text_dim)}
        off = own(**given)[0]
        assert torch.allclose(off, base(**given)[0], atol=1e-6)
    assert not torch.allclose(own(**given)[0], off, atol=1e-3)


def test_attention_keeps_its_answer_and_not_what_it_was_given() -> None:
    qkv = [torch.randn(1, 8, 2, 4) for _ in range(3)]
    copies = [tensor.clone().requires_grad_() for tensor in qkv]

    def attend(*given: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in given)).transpose(1, 2)

    plain = attend(*copies)
    gradient = torch.randn_like(plain)
    plain.backward(gradient)
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in qkv]
    attention = Attention(qkv, attend)
    again = [tensor.detach().clone() for tensor in qkv]
    del qkv
    gc.collect()
    assert all(storage() is None for storage in storages)
    for own, copied in zip(attention.backward(gradient.flatten(2), again), copies, strict=True):
        assert torch.equal(own, copied.grad)
    output = weakref.ref(attention.output.untyped_storage())
    del attention
    gc.collect()
    assert output() is None


def test_nothing_is_computed_that_no_adapter_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("self_backward", "cross_backward", "ffn_backward"):
        real = getattr(block.BlockPass, name)
        monkeypatch.setattr(block.BlockPass, name, lambda self, *given, real=real, name=name: (
            calls.append(name), real(self, *given))[1])
    passed(ours(adapted("t2v", [r"blocks\.1\.ffn\.net\.2"]), "inputs"), "t2v")
    assert calls == ["ffn_backward"]
    calls.clear()
    passed(ours(adapted("t2v", [r"blocks\.1\.attn2\.to_q"]), "inputs"), "t2v")
    assert calls == ["ffn_backward", "cross_backward"]


@pytest.mark.parametrize("num_swapped", [1, 2])
@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_swapped_blocks_give_equal_numbers_and_two_at_most_are_on_the_device(kind: str, num_swapped: int) -> None:
    whole = passed(ours(adapted(kind, ALL), "all"), kind)
    for keep in block.KEEPS:
        transformer = adapted(kind, ALL)
        before = {name: p.clone() for name, p in transformer.named_parameters() if not p.requires_grad}
        swap = block.train_blocks(transformer, BlockMemory(keep, num_swapped), CPU)
        assert swap is not None
        for _ in range(2):
            own = passed(transformer, kind)
            assert torch.equal(own[0], whole[0])
            assert all(torch.equal(gradient, whole[1][name]) for name, gradient in own[1].items())
        assert swap.most_resident <= min(2, num_swapped)
        assert all(torch.equal(parameter, before[name]) for name, parameter in transformer.named_parameters()
                   if name in before)


def test_swapped_are_blocks_at_equal_distances() -> None:
    assert spread(40, 0) == []
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(6, 2) == [2, 5]
    assert [len(spread(40, number)) for number in range(41)] == list(range(41))


def three_blocks(*, mapped: bool = False) -> tuple[list[list[torch.Tensor]], Swap]:
    weights = [[torch.full((3, 5), float(i)), torch.full((2,), -float(i))] for i in range(4)]
    return weights, Swap(weights, CPU, mapped=mapped)


def test_a_weight_that_is_read_before_its_copy_has_landed_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, swap = three_blocks()
    monkeypatch.setattr(swap.copies, "wait", lambda _: None)
    swap.acquire(1, 1)
    assert weights[1][0].isnan().all()


@pytest.mark.parametrize("mapped", [False, True])
def test_the_ring_brings_each_block_in_time_forward_and_backward(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, swap = three_blocks(mapped=mapped)
    finished: list[object] = []
    finish = swap.copies.finish
    monkeypatch.setattr(swap.copies, "finish", lambda ticket: (finished.append(ticket), finish(ticket)))
    for number, step in [*((i, 1) for i in range(4)), *((i, -1) for i in range(3, -1, -1)), (0, 1), (1, 1), (2, -1)]:
        swap.acquire(number, step)
        assert weights[number][0].eq(number).all()
        assert weights[number][1].eq(-number).all()
        on_device = {slot.memory.untyped_storage()._cdata for slot in swap.slots}
        assert weights[number][0].untyped_storage()._cdata in on_device
        assert sum(own[0].untyped_storage()._cdata in on_device for own in weights) <= 2
    assert swap.most_resident == len(swap.slots) == 2
    assert swap.num_copies == 4 + 2 + 0 + 1  # forward all, backward what has left, then 0 and 1 are there
    assert len(finished) == (7 - 2 if mapped else 0)  # before the memory that they came through is written anew


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_what_waits_on_the_host_comes_back_as_it_was(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for a GPU's copies gives no number to whoever reads too early."""
    whole = passed(ours(adapted(kind, ALL), "all"), kind)
    num_blocks = len(block.blocks_of(tiny.transformer(kind)))
    mixed = ("inputs", *("all",) * (num_blocks - 2), "attention")
    sent: list[int] = []
    send = Offload.send
    monkeypatch.setattr(Offload, "send", lambda self, tensors: (sent.append(len(tensors)), send(self, tensors))[1])
    for keep in (*block.KEEPS, mixed):
        transformer = adapted(kind, ALL)
        block.train_blocks(transformer, BlockMemory(keep, 1, offload=True), CPU)
        for _ in range(2):
            sent.clear()
            own = passed(transformer, kind)
            assert len(sent) == num_blocks
            assert min(sent) > 0
            assert torch.equal(own[0], whole[0])
            assert all(torch.equal(gradient, whole[1][name]) for name, gradient in own[1].items())


def test_a_parcel_leaves_the_device_when_the_next_is_on_its_way() -> None:
    offload = Offload(CPU)
    own = [torch.arange(12.0).view(3, 4) + i for i in range(3)]
    known = [weakref.ref(tensor.untyped_storage()) for tensor in own]
    expected = [tensor.clone() for tensor in own]
    parcels = []
    for i in range(3):
        parcels.append(offload.send([own[i].T, own[i][1:]]))
        own[i] = torch.empty(0)
        gc.collect()
        assert [storage() is None for storage in known] == [j < i for j in range(3)]
    for i in (2, 1, 0):
        turned, part = offload.fetch(parcels[i])
        assert torch.equal(turned, expected[i].T)
        assert torch.equal(part, expected[i][1:])
        assert turned.untyped_storage()._cdata == part.untyped_storage()._cdata
