"""What storing the frozen base in fewer bits costs a step, and what it saves.

    python -m benchmarks.base_forms [--tokens 1560] [--rounds 5]

Two blocks of Wan 1.3B's width with a LoRA of rank 16 on attention and feed-forward, random weights, float32 (this CPU's
bfloat16 products say nothing); forward and backward. The ratio is of CPU seconds to those of `dtype` in the same run,
the median over rounds in which all take turns. nf4 has a row where bitsandbytes is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel

from wantrain.lora import Spec
from wantrain.models import four_bits
from wantrain.models.fit import NewAdapter, fit
from wantrain.models.quantised import QuantisedLinear, quantise
from wantrain.models.variants import VARIANTS, diffusers_config

CPU = torch.device("cpu")


def forms() -> tuple[str, ...]:
    """Those in fewer bits that this environment has."""
    return ("int8", "fp8", *(() if four_bits.fault("nf4") else ("nf4",)))


def transformer_of(form: str) -> torch.nn.Module:
    variant = VARIANTS["wan21_t2v_1b3"]
    config = diffusers_config(replace(variant, architecture=replace(variant.architecture, num_layers=2)))
    torch.manual_seed(0)
    made = WanTransformer3DModel.from_config(config)
    if form:
        weights = made.state_dict()
        quantise(made, form)
        for name, layer in made.named_modules():
            if isinstance(layer, QuantisedLinear):
                layer.bias = torch.nn.Parameter(weights[f"{name}.bias"])
                layer.store(weights[f"{name}.weight"])
    made.requires_grad_(False)
    fit(made, CPU, NewAdapter(["attn_ffn"], Spec(16, 16.0), 0))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1560)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    side = round((given.tokens / 5) ** 0.5) * 2
    inputs = {"hidden_states": torch.randn(1, 16, 5, side, side), "timestep": torch.tensor([500.0]),
              "encoder_hidden_states": torch.randn(1, 512, 4096), "return_dict": False}
    models = {"dtype": transformer_of(""), **{form: transformer_of(form) for form in forms()}}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(given.rounds + 1):
        for name, model in models.items():
            began = time.process_time()
            model(**inputs)[0].square().mean().backward()
            if number:
                times[name].append(time.process_time() - began)
    for name, model in models.items():
        size = sum(t.nbytes for key, t in (*model.named_parameters(), *model.named_buffers())
                   if "blocks." in key and "lora_" not in key)
        ratio = statistics.median(times[name]) / statistics.median(times["dtype"])
        print(f"{name:6} step {ratio:.3f}   blocks' weights {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
