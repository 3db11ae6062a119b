"""The tensors of every variant by arithmetic, against diffusers' own classes and the public files' numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from wantrain.models import inventory
from wantrain.models.fun import class_of
from wantrain.models.variants import VARIANTS, diffusers_config

ELSEWHERE = "motion_encoder."


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_names_and_shapes_are_those_of_diffusers_class(variant):
    own = variant.architecture
    few = own if "tiny" in variant.name else replace(own, num_layers=5 if own.animate else 2,
                                                     vace_layers=own.vace_layers and (0, 1))
    with torch.device("meta"):
        model = class_of(variant).from_config(
            diffusers_config(replace(variant, architecture=few)))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(ELSEWHERE)}
    assert inventory.tensors(few) == shapes
    linears = {name: (module.in_features, module.out_features) for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and not name.startswith(ELSEWHERE)}
    assert inventory.linears(few) == linears
    kept = set(model._keep_in_fp32_modules)
    assert {name for name in shapes if inventory.is_float32(name)} == {
        name for name in shapes if kept & set(name.split("."))}


def test_the_numbers_of_parameters_are_those_of_the_public_files():
    counted = {variant.name: sum(map(math.prod, inventory.tensors(variant.architecture).values()))
               for variant in VARIANTS.values() if variant.num_parameters}
    assert len(counted) == 22
    assert counted == {name: VARIANTS[name].num_parameters for name in counted}
