"""Compiled operations: the numbers of those that are not, equal ones under every policy, counted, out of the ETA."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wantrain import metrics
from wantrain.models import block_operations, compiled
from wantrain.models.block_operations import EAGER, Operations

CPU = torch.device("cpu")
B, L, D, HEADS = 2, 24, 64, 4


def outcomes(does: Operations, dtype: torch.dtype) -> list[torch.Tensor]:
    """What all operations answer to the same random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, gradient = random(B, L, D).to(dtype), random(B, L, D).to(dtype)
    turns = torch.polar(torch.ones(1, L, 1, D // HEADS // 2), random(1, L, 1, D // HEADS // 2))
    weight, by_token = random(D), random(B, L, D)
    one_row = random(1, 1, D)
    found: list[torch.Tensor] = []
    for factor, offset in ((None, None), (one_row, one_row), (by_token, by_token)):
        out, mean, rstd = does.normed(x, 1e-6, factor, offset, dtype)
        found += [out, mean, rstd, does.normed_backward(gradient, x, mean, rstd, factor)]
    scale = does.rms_scale(x, 1e-6)
    for own in (turns, None):
        heads = does.in_heads(x, scale, weight, own, HEADS)
        assert heads.shape == (B, L, HEADS, D // HEADS)
        found += [heads, does.in_heads_backward(gradient.view(heads.shape), x, scale, weight, own)]
    return [*found, scale, does.gated(x, gradient, one_row), *does.gelu_backward(x, gradient.clone())]


def test_operations_are_what_autograd_says_of_plain_ones() -> None:
    """In float64, where autograd gives the gradients of torch's own norm and of the turns."""
    x = torch.randn(B, L, D, requires_grad=True)
    gradient, weight = torch.randn(B, L, HEADS, D // HEADS), torch.randn(D)
    turns = torch.polar(torch.ones(1, L, 1, D // HEADS // 2), torch.randn(1, L, 1, D // HEADS // 2))
    for own in (turns, None):
        plain = torch.nn.functional.rms_norm(x.double(), [D], weight.double(), 1e-6).view(B, L, HEADS, -1)
        if own is not None:
            pairs = torch.view_as_complex(plain.reshape(B, L, HEADS, -1, 2)) * own
            plain = torch.view_as_real(pairs).flatten(-2)
        wanted, = torch.autograd.grad(plain, x, gradient.double())
        scale = EAGER.rms_scale(x.detach(), 1e-6)
        torch.testing.assert_close(EAGER.in_heads(x.detach(), scale, weight, own, HEADS), plain.float())
        torch.testing.assert_close(EAGER.in_heads_backward(gradient, x.detach(), scale, weight, own), wanted.float())


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gelu_and_its_gradient(dtype: torch.dtype, in_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, as on a CPU, and at once, as on a GPU."""
    monkeypatch.setattr(block_operations, "_PART", 1000)
    monkeypatch.setattr(block_operations, "_goes_in_parts", lambda x: in_parts)
    x = torch.cat([torch.linspace(-30, 30, 1201), torch.randn(1199)]).view(2, 1200).to(dtype)
    gradient, exact = torch.randn(2, 1200).to(dtype), x.double().requires_grad_()
    plain = torch.nn.functional.gelu(exact, approximate="tanh")
    wanted, = torch.autograd.grad(plain, exact, gradient.double())
    given, before = gradient.clone(), x.clone()
    raised, found = EAGER.gelu_backward(x, given)
    assert found is given  # it takes its memory
    assert torch.equal(x, before)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    torch.testing.assert_close(raised.double(), plain.detach(), **tolerance)
    torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_operations_give_the_numbers_of_the_others(dtype: torch.dtype) -> None:
    """With inductor's C++ in triton's place; twice, since what a policy computes again must be equal to the bit."""
    count = compiled.Count()
    own = outcomes(compiled.compiled(), dtype)
    assert "kernels for a new size of clips" in count.news()
    assert all(torch.equal(*pair) for pair in zip(own, outcomes(compiled.compiled(), dtype), strict=True))
    assert count.news() == ""
    for ours, plain in zip(own, outcomes(EAGER, dtype), strict=True):
        difference = (ours.double() - plain.double()).norm() / plain.double().norm()
        assert difference < (1e-5 if plain.dtype == torch.float32 else 1e-2)


def test_without_a_gpu_nothing_is_compiled() -> None:
    assert compiled.operations_for(CPU) == (EAGER, "no")


def test_steps_that_compile_are_counted_and_stay_out_of_the_eta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                ) -> None:
    stats = {"unique_graphs": 0}
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", SimpleNamespace(counters={"stats": stats}))
    count = compiled.Count()
    assert count.news() == ""
    stats["unique_graphs"] = 9
    assert count.news() == "compiled 9 kernels for a new size of clips, 9 in all"
    assert count.news() == ""
    with metrics.Metrics(tmp_path / "metrics.jsonl", lambda *_: None, 0, 10, True) as board:
        bar, now = board._bar, [0.0]
        bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
        now[0] = 100.0  # the first step compiles
        board.advance({}, is_usual=False)
        for _ in range(4):
            now[0] += 1.0
            board.advance({})
        assert bar.format_dict["elapsed"] == 4.0
