"""What changes a loaded transformer: in one order, each part only where it belongs."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests import tiny_models as tiny
from wantrain import lora
from wantrain.lora import Spec
from wantrain.models import fit
from wantrain.models.block import BlockMemory
from wantrain.models.fit import NewAdapter
from wantrain.terms import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ADAPTER = NewAdapter(["attn"], Spec(2, 2.0), 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts in the order in which they are put in."""
    done: list[str] = []
    inject = lora.inject
    monkeypatch.setattr(fit, "shorten_text", lambda _: done.append("short text"))
    monkeypatch.setattr(lora, "inject", lambda *given: (done.append("adapter"), inject(*given))[1])
    monkeypatch.setattr(fit.block, "train_blocks", lambda _, memory, *__: done.append(
        f"blocks keep {memory.keep}, {memory.swap} swapped"))
    monkeypatch.setattr(WanTransformer3DModel, "enable_gradient_checkpointing",
                        lambda self: done.append("checkpointing"))
    monkeypatch.setattr(fit.sequence, "share_tokens", lambda _, parts: done.append(f"tokens of {parts}"))
    return done


def test_the_order_is_the_one_that_is_stated(calls: list[str]) -> None:
    transformer = copy.deepcopy(tiny.transformer("t2v"))
    modules = fit.fit(transformer, CPU, ADAPTER, memory=BlockMemory("attention", 1), sequence_parallel=2)
    assert calls == ["short text", "adapter", "blocks keep attention, 1 swapped", "tokens of 2"]
    assert modules == [name for name, module in transformer.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(("kind", "is_divided"), [("lora", True), ("dora", False), ("lokr", False)])
def test_where_the_blocks_cannot_be_ours_diffusers_own_are_checkpointed(calls: list[str], kind: str, is_divided: bool
                                                                        ) -> None:
    adapter = NewAdapter(["attn"], Spec(2, 2.0, kind), 0)
    for keep, done in (("all", []), ("inputs", ["checkpointing"])):
        fit.fit(copy.deepcopy(tiny.transformer("t2v")), CUDA, adapter, memory=BlockMemory(keep), is_divided=is_divided)
        assert calls == ["adapter", *done]
        calls.clear()
    with pytest.raises(UserError, match="Allowed there: all, inputs"):
        fit.fit(copy.deepcopy(tiny.transformer("t2v")), CUDA, adapter, memory=BlockMemory("attention"),
                is_divided=is_divided)


def test_a_sampler_has_our_blocks_and_nothing_else_that_is_not_asked_for(calls: list[str]) -> None:
    ours = "blocks keep all, 0 swapped"
    assert fit.fit(copy.deepcopy(tiny.transformer("t2v")), CUDA) == []
    assert fit.fit(copy.deepcopy(tiny.transformer("i2v")), CPU) == []  # its image tokens stand before the text
    assert calls == [ours, ours]
    assert fit.fit(copy.deepcopy(tiny.transformer("t2v")), CPU) == []
    assert calls[2:] == ["short text", ours]
