"""Which kernel computes attention: the device's fastest that gives gradients, and none that cuts them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Collection

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from tests import tiny_models as tiny
from wantrain.lora import Spec
from wantrain.models import attention, fit
from wantrain.models.fit import NewAdapter
from wantrain.terms import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUERY = torch.randn(1, 8, 2, 16)


@pytest.fixture
def transformer() -> torch.nn.Module:
    return copy.deepcopy(tiny.transformer("t2v"))


@pytest.mark.parametrize("case", [
    ((9, 0), True, {"_native_cudnn", "flash"}, "_native_cudnn"), ((12, 0), True, {"flash"}, "flash"),
    ((8, 9), True, {"_native_cudnn", "flash"}, "flash"), ((8, 9), False, {"_native_cudnn", "flash"}, "native"),
    ((9, 0), True, set(), "native"),
])
def test_the_first_that_works_is_taken(transformer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch,
                                       case: tuple[tuple[int, int], bool, Collection[str], str]) -> None:
    capability, installed, usable, chosen = case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: installed or None)
    monkeypatch.setattr(attention, "works", lambda name, _: name in usable)
    monkeypatch.setattr(attention, "tried", lambda *_: QUERY)
    attention.choose(transformer, CUDA)
    assert {own._attention_backend.value for own in attention.processors(transformer)} == {chosen}
    assert len(attention.processors(transformer)) == 2 * transformer.config.num_layers
    assert attention.name_of(transformer, CUDA) == (chosen if chosen != "native" else "native (flash)")


def test_a_kernel_that_cuts_gradients_fails_or_is_not_there_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.works("native", QUERY)
    assert not attention.works("flash", QUERY)  # not installed, and not for a CPU
    for answer in (lambda q, *_, **__: q * torch.nan, lambda q, *_, **__: q, lambda q, *_, **__: q.detach()):
        monkeypatch.setattr(attention, "dispatch_attention_fn", answer)
        assert not attention.works("native", QUERY)


def test_sageattention_is_refused_in_training_by_name(transformer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
                                                      ) -> None:
    monkeypatch.setattr(attention._AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    with pytest.raises(UserError, match="DIFFUSERS_ATTN_BACKEND = sage has no backward pass"):
        fit.fit(transformer, CPU, NewAdapter(["attn"], Spec(2, 2.0), 0))
    assert fit.fit(copy.deepcopy(tiny.transformer("t2v")), CPU) == []  # a sampler needs no gradients


def test_what_the_user_chose_is_kept(transformer: torch.nn.Module) -> None:
    with attention_backend("_native_math"):
        fit.fit(transformer, CPU, NewAdapter(["attn"], Spec(2, 2.0), 0))
    assert attention.name_of(transformer, CPU) == "_native_math"


def test_torchs_own_choice_is_named_as_torch_names_it() -> None:
    kernels = {backend.name.partition("_")[0].lower(): int(backend) for backend in
               torch.nn.attention.SDPBackend.__members__.values() if int(backend) in range(4)}
    assert tuple(sorted(kernels, key=kernels.__getitem__)) == attention.SDPA_KERNELS
