"""The parts of the memory's savings that only a GPU has: copies beside the computation, attention's kernels, peaks."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from benchmarks import gpu
from benchmarks.gpu import Row
from wantrain.models import attention
from wantrain.models.copies import CudaCopies
from wantrain.models.encode import autocast, predict_velocity
from wantrain.terms import TEXT_LEN

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
Tell = Callable[[str], None]


def test_copies_arrive_in_the_order_of_the_computation() -> None:
    """While a copy is on its way its source is used and its target is written anew: both in the stated order."""
    copies, size = CudaCopies(CUDA), 64 * 2**20
    host, device = copies.host(size), torch.zeros(size, dtype=torch.uint8, device=CUDA)
    assert host.is_pinned()
    for value in range(1, 6):
        host.fill_(value)
        ticket = copies.start(device, host)
        copies.wait(ticket)
        total = device.sum(dtype=torch.int64)
        device.add_(1)
        back = copies.start(host, device)
        copies.wait(back)
        torch.cuda.synchronize()
        assert int(total) == value * size
        assert bool(host.eq(value + 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernel_that_is_chosen_gives_the_gradients_of_plain_arithmetic(dtype: torch.dtype, tell: Tell) -> None:
    qkv = [torch.randn(1, 1000, 12, 128, device=CUDA, dtype=dtype) for _ in range(3)]
    outcomes: dict[str, list[torch.Tensor]] = {}
    usable = [name for name in attention.candidates(CUDA) if attention.works(name, qkv[0][:, :128])]
    assert usable[-1] == "native"
    for name in (*usable, "_native_math"):
        own = [one.detach().clone().requires_grad_() for one in qkv]
        answer = dispatch_attention_fn(*own, backend=AttentionBackendName(name))
        answer.backward(torch.ones_like(answer) * answer.detach())
        outcomes[name] = [answer.detach(), *(one.grad for one in own if one.grad is not None)]
    exact = outcomes.pop("_native_math")
    for name, found in outcomes.items():
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        tell(f"attention, {dtype}: {name} off by at most {max(errors):.2e}")
        assert max(errors) < (0.02 if dtype == torch.bfloat16 else 1e-3), name
    tell(f"attention, {dtype}: chosen is {usable[0]}, torch's own choice {attention.sdpa_kernel(qkv[0])}")


KEPT = [("all", "", 0, False), ("attention", "", 0, False), ("inputs", "", 15, False), ("attention", "int8", 15, True),
        ("inputs", "fp8", 0, False)]


@pytest.mark.parametrize(("keep", "swap", "offload"), [
    ("inputs", 0, False), ("attention", 1, False), ("all", 2, False), ("attention", 1, True)])
def test_what_waits_on_the_host_gives_equal_gradients(keep: str, swap: int, offload: bool) -> None:
    def passed(row: Row) -> list[torch.Tensor]:
        torch.manual_seed(0)
        variant = gpu.variant_of(row, is_tiny=True)
        model = gpu.model_of(row, variant, CUDA, 4)
        noisy = torch.randn(1, 16, *variant.latent_THW(row.bucket), device=CUDA, dtype=torch.bfloat16)
        text = torch.randn(1, TEXT_LEN, variant.architecture.text_dim, device=CUDA, dtype=torch.bfloat16)
        with autocast(CUDA, torch.bfloat16):
            answer = predict_velocity(model, noisy, torch.tensor([0.5], device=CUDA), text)
        answer.float().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = passed(gpu.tiny(Row("wan21_t2v_1b3", "wantrain")))
    spared = passed(gpu.tiny(Row("wan21_t2v_1b3", "wantrain", keep, "", swap, offload)))
    assert len(plain) == len(spared) > 0
    assert any(bool(gradient.any()) for gradient in plain)
    assert all(torch.equal(*pair) for pair in zip(plain, spared, strict=True))


@pytest.mark.parametrize("row", [Row("wan21_t2v_1b3", "wantrain", *kept) for kept in KEPT], ids=lambda row: row.name)
def test_peak_memory_is_the_plans_within_a_tenth(row: Row, tell: Tell) -> None:
    given = argparse.Namespace(device="cuda", tiny=False, rank=16, steps=2)
    line = {**gpu.line_of(row, torch.cuda.get_device_name(), given), **gpu.tried(row, given)}
    assert "fault" not in line
    measured, planned = line["peak_gib"], line["planned_gib"]
    tell(f"{row.name}: {line['seconds']:.3f} s, {measured:.2f} GiB where {planned:.2f} were planned")
    assert measured == pytest.approx(planned, rel=0.1)
