"""What a LoRA step of the transformer blocks takes against the least it could take: time and what autograd keeps.

    python -m benchmarks.block [--tokens 1024] [--text 64] [--rank 32] [--rounds 5] [--compiled]

Two blocks of Wan 1.3B's width, random weights, LoRA on attention and feed-forward, float32 (this CPU's bfloat16 products
say nothing). The floor is the same matrix products, LoRA's included, and the same attention, forward and for the
gradients, and nothing else. All take turns in each round; ratios of CPU seconds to the floor's, the median over rounds.
Kept: bytes alive after the forward pass that were not before, in tensors of tokens x width, a block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wantrain import lora
from wantrain.lora import Spec
from wantrain.models.base import WanTransformer3DModel, diffusers_config
from wantrain.models.block import KEEPS, train_blocks
from wantrain.models.fit import NewAdapter, fit
from wantrain.models.variants import VARIANTS

NUM_BLOCKS = 2
VARIANT = VARIANTS["wan21_t2v_1b3"]
ARCHITECTURE = replace(VARIANT.architecture, num_layers=NUM_BLOCKS)


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage(), given)
        return result

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return

        def gone(_: object) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size


def transformer_of(rank: int) -> torch.nn.Module:
    torch.manual_seed(0)
    made = WanTransformer3DModel.from_config(diffusers_config(replace(VARIANT, architecture=ARCHITECTURE)))
    made.requires_grad_(False)
    fit(made, torch.device("cpu"), NewAdapter(["attn_ffn"], Spec(rank, float(rank)), 0))
    return made


class Floor:
    """The products and attentions of one forward and backward pass, on tensors at hand."""

    def __init__(self, model: torch.nn.Module, tokens: int, text: int, rank: int) -> None:
        dim, ffn = ARCHITECTURE.dim, ARCHITECTURE.ffn_dim
        self.heads, self.rank = ARCHITECTURE.num_heads, rank
        self.sizes = [(tokens, dim, dim)] * 6 + [(text, dim, dim)] * 2 + [(tokens, dim, ffn), (tokens, ffn, dim)]
        self.weights = [torch.randn(out, into) for _, into, out in self.sizes]
        self.biases = [torch.randn(out) for _, _, out in self.sizes]
        self.down = [torch.randn(rank, into) for _, into, _ in self.sizes]
        self.up = [torch.randn(out, rank) for _, _, out in self.sizes]
        self.given = {(n, w): torch.randn(n, w) for n, into, out in self.sizes for w in (into, out)}
        self.q = torch.randn(1, self.heads, tokens, dim // self.heads, requires_grad=True)
        self.k = torch.randn(1, self.heads, text, dim // self.heads, requires_grad=True)

    def forward(self) -> list[torch.Tensor]:
        for (n, into, _), weight, bias, down, up in zip(self.sizes, self.weights, self.biases, self.down, self.up,
                                                        strict=True):
            low = functional.linear(self.given[n, into], down)
            functional.linear(self.given[n, into], weight, bias).addmm_(low, up.T)
        return [functional.scaled_dot_product_attention(self.q, self.q, self.q),
                functional.scaled_dot_product_attention(self.q, self.k, self.k)]

    def step(self) -> None:
        for _ in range(NUM_BLOCKS):
            attended = self.forward()
            for number, ((n, into, out), weight, down, up) in enumerate(zip(self.sizes, self.weights, self.down,
                                                                           self.up, strict=True)):
                gradient, given = self.given[n, out], self.given[n, into]
                low = torch.empty(n, self.rank)
                _ = gradient.T @ low
                low_gradient = gradient @ up
                _ = low_gradient.T @ given
                if number not in (6, 7):  # the text's keys and values: the text needs no gradient
                    (gradient @ weight).addmm_(low_gradient, down)
            for output in attended:
                torch.autograd.grad(output, [self.q, self.k][: 1 + (output is attended[1])], output)


@contextmanager
def counting() -> Iterator[Alive]:
    with Alive() as alive:
        yield alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text", type=int, default=64, help="tokens of the caption; the rest is zeros")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    frames = 4
    side = round((given.tokens / frames) ** 0.5)
    tokens = frames * side * side
    dim = ARCHITECTURE.dim
    hidden = torch.randn(1, tokens, dim)
    models: dict[str, torch.nn.Module] = {"diffusers + PEFT": transformer_of(given.rank)}
    models["diffusers + PEFT, checkpointed"] = transformer_of(given.rank)
    for keep in KEEPS:
        models[f"wantrain, keep={keep}"] = model = transformer_of(given.rank)
        train_blocks(model, [keep] * NUM_BLOCKS)
    base = models["diffusers + PEFT"]
    text = torch.randn(1, given.text, dim)
    latents = torch.randn(1, 16, frames, 2 * side, 2 * side)
    temb, rotary = torch.randn(1, 6, dim), base.rope(latents)

    def passes(model: torch.nn.Module, checkpointed: bool) -> torch.Tensor:
        x = hidden.detach().requires_grad_()  # as if blocks came before
        for block in model.blocks:
            x = (torch.utils.checkpoint.checkpoint(block, x, text, temb, rotary, use_reentrant=False) if checkpointed
                 else block(x, text, temb, rotary))
        return x

    def step(name: str) -> None:
        model = models[name]
        passes(model, "checkpointed" in name).backward(hidden)

    for model in models.values():
        for block in model.blocks:
            block.attn2.processor.bias_L = torch.zeros(given.text)
    floor = Floor(base, tokens, given.text, given.rank)
    work: dict[str, Callable[[], None]] = {"floor": floor.step, **{name: lambda name=name: step(name) for name in models}}
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(given.rounds + 1):
        for name, call in work.items():
            began = time.process_time()
            call()
            if number:
                times[name].append(time.process_time() - began)
            for model in models.values():
                model.zero_grad()
    rows = {}
    for name in work:
        ratio = statistics.median(t / f for t, f in zip(times[name], times["floor"], strict=True))
        kept = 0.0
        if name in models:
            with counting() as alive:
                before = alive.bytes
                out = passes(models[name], "checkpointed" in name)
                kept = (alive.bytes - before) / (NUM_BLOCKS * tokens * dim * 4)
                del out
        rows[name] = {"x floor": round(ratio, 3), "kept": round(kept, 2), "tokens": tokens}
        print(f"{ratio:7.3f} x floor   {kept:6.2f} kept a block   {name}", flush=True)
    if given.json:
        print(json.dumps(rows))
    assert lora.trainable_parameters(base)


if __name__ == "__main__":
    main()
