"""What a LoRA step of the transformer blocks takes against the least it could take: time and what autograd keeps.

    python -m benchmarks.block [--tokens 1024] [--text 64] [--rank 32] [--rounds 5]

Two blocks of Wan 1.3B's width, random weights, LoRA on attention and feed-forward, float32 (this CPU's bfloat16
products say nothing). The floor is the same matrix products, those of LoRA too, and the same attention, forward and for
the gradients, and nothing else. All take turns in each round; ratios of CPU seconds to the floor's, the median over
rounds. Kept: bytes alive after the forward pass that were not before, in tensors of tokens x width, a block. Then what
a pass takes in sampling, without gradients, against diffusers' blocks without a LoRA.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.allocations import Allocations
from wantrain import lora
from wantrain.lora import Spec
from wantrain.models.block import KEEPS, BlockMemory, train_blocks
from wantrain.models.short_text import shorten_text
from wantrain.models.variants import VARIANTS, Architecture, diffusers_config

NUM_BLOCKS, NUM_FRAMES = 2, 4
CPU = torch.device("cpu")
VARIANT = VARIANTS["wan21_t2v_1b3"]
ARCHITECTURE = replace(VARIANT.architecture, num_layers=NUM_BLOCKS)


def transformer_of(rank: int) -> torch.nn.Module:
    torch.manual_seed(0)
    made = WanTransformer3DModel.from_config(diffusers_config(replace(VARIANT, architecture=ARCHITECTURE)))
    made.requires_grad_(False)
    shorten_text(made)
    if rank:
        lora.inject(made, ["attn_ffn"], Spec(rank, float(rank)), 0)
    return made


class Floor:
    """The products and attentions of one forward and backward pass of a block, on tensors at hand."""

    def __init__(self, own: Architecture, tokens: int, text: int, rank: int, *,
                 device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        dim, ffn = own.dim, own.ffn_dim
        self.sizes = [(tokens, dim, dim)] * 6 + [(text, dim, dim)] * 2 + [(tokens, dim, ffn), (tokens, ffn, dim)]
        self.weights = [random(out, into) for _, into, out in self.sizes]
        self.biases = [random(out) for _, _, out in self.sizes]
        self.down = [random(rank, into) for _, into, _ in self.sizes]
        self.up = [random(out, rank) for _, _, out in self.sizes]
        self.given = {(n, w): random(n, w) for n, into, out in self.sizes for w in (into, out)}
        self.q = random(1, own.num_heads, tokens, dim // own.num_heads).requires_grad_()
        self.k = random(1, own.num_heads, text, dim // own.num_heads).requires_grad_()

    def forward(self) -> list[torch.Tensor]:
        for (n, into, _), weight, bias, down, up in zip(self.sizes, self.weights, self.biases, self.down, self.up,
                                                        strict=True):
            low = functional.linear(self.given[n, into], down)
            functional.linear(self.given[n, into], weight, bias).addmm_(low, up.T)
        return [functional.scaled_dot_product_attention(self.q, self.q, self.q),
                functional.scaled_dot_product_attention(self.q, self.k, self.k)]

    def step(self, num_blocks: int = NUM_BLOCKS) -> None:
        for _ in range(num_blocks):
            attended = self.forward()
            for number, ((n, into, out), weight, down, up) in enumerate(zip(self.sizes, self.weights, self.down,
                                                                           self.up, strict=True)):
                gradient, given = self.given[n, out], self.given[n, into]
                low_gradient = gradient @ up
                _ = gradient.T @ low_gradient  # in the place of the low product itself: of its size
                _ = low_gradient.T @ given
                if number not in (6, 7):  # the text's keys and values: the text needs no gradient
                    (gradient @ weight).addmm_(low_gradient, down)
            for output in attended:
                torch.autograd.grad(output, [self.q, self.k][: 1 + (output is attended[1])], output)


class Blocks:
    """Two blocks, called as the transformer calls them."""

    def __init__(self, model: torch.nn.Module, side: int, num_text: int, *, checkpointed: bool = False) -> None:
        self.model, self.checkpointed = model, checkpointed
        dim = ARCHITECTURE.dim
        self.hidden = torch.randn(1, NUM_FRAMES * side * side, dim)
        self.rest = (torch.randn(1, num_text, dim), torch.randn(1, 6, dim),
                     model.rope(torch.empty(1, 16, NUM_FRAMES, 2 * side, 2 * side)))
        for block in model.blocks:
            block.attn2.processor.bias_L = torch.zeros(num_text)

    def forward(self) -> torch.Tensor:
        x = self.hidden.detach().requires_grad_()  # as if blocks came before
        for block in self.model.blocks:
            x = checkpoint(block, x, *self.rest, use_reentrant=False) if self.checkpointed else block(x, *self.rest)
        return x

    def step(self) -> None:
        self.model.zero_grad()
        self.forward().backward(self.hidden)

    def kept(self) -> float:
        """What is alive after the forward pass and was not before, in tensors of tokens x width, a block."""
        with Allocations() as allocations:
            allocations.count([*self.model.parameters(), self.hidden, *self.rest])
            before = allocations.alive
            out = self.forward()
            kept = (allocations.alive - before) / (NUM_BLOCKS * self.hidden.nbytes)
        del out
        return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text", type=int, default=64, help="tokens of the caption; the zeros behind them are one")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    side = round((given.tokens / NUM_FRAMES) ** 0.5)
    tokens = NUM_FRAMES * side * side
    contestants = {"diffusers + PEFT": Blocks(transformer_of(given.rank), side, given.text),
                   "diffusers + PEFT, checkpointed": Blocks(transformer_of(given.rank), side, given.text,
                                                            checkpointed=True)}
    for keep in (*KEEPS, ("attention", "inputs")):
        told = keep if isinstance(keep, str) else f"auto, as {' and '.join(keep)}"
        contestants[f"wantrain, memory.keep={told}"] = Blocks(trained(transformer_of(given.rank), keep), side,
                                                              given.text)
    floor = Floor(ARCHITECTURE, tokens, given.text, given.rank)
    print(f"{tokens} tokens, text {given.text}, rank {given.rank}, {given.rounds} rounds")
    found = ratios({"floor": floor.step, **{name: own.step for name, own in contestants.items()}}, given.rounds)
    for name, ratio in found.items():
        kept = contestants[name].kept() if name in contestants else 0.0
        print(f"{ratio:7.3f} x floor  {kept:6.2f} kept  {name}", flush=True)
    passes = {"diffusers without a LoRA": Blocks(transformer_of(0), side, given.text),
              "diffusers + PEFT": contestants["diffusers + PEFT"],
              "wantrain": contestants["wantrain, memory.keep=all"]}
    with torch.no_grad():
        for name, ratio in ratios({name: own.forward for name, own in passes.items()}, given.rounds).items():
            print(f"{ratio:7.3f} x bare passes, sampling: {name}", flush=True)


def trained(model: torch.nn.Module, keep: str | tuple[str, ...]) -> torch.nn.Module:
    """The same, with wantrain's blocks."""
    train_blocks(model, BlockMemory(keep), CPU)
    return model


def ratios(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each against the first's, the median over rounds after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            times[name].append(cpu_seconds(call))
    first = next(iter(times.values()))
    return {name: statistics.median(own / least for own, least in zip(taken[1:], first[1:], strict=True))
            for name, taken in times.items()}


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
