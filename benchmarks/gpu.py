"""What a LoRA step takes on one card: seconds and peak memory, ours and diffusers + PEFT, beside floor and plan.

    python -m benchmarks.gpu [--out gpu.jsonl] [--seconds 570] [--rank 16] [--device cpu --tiny] [--predict h100]

Random weights in bfloat16 for 1.3B, 5B and 14B, loaded as a training loads them; LoRA on attention and feed-forward;
forward, backward, clipping and AdamW, a clip at a time. 480 x 480 x 81 frames is the shape of the one published row
of the field (H100, bfloat16, rank 16, the base streamed from the host), which is printed beside ours. The floor is the
same matrix products and attention and nothing else. --predict measures nothing: it prints what the plan says of a card.

Each row is a line of JSON in --out as soon as it is measured; a row that is there, of the same card and commit, is not
measured again. So the command may be stopped, and started again, and after --seconds it begins no row more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.block import Floor
from wantrain import costs, flow, lora
from wantrain.lora import Spec
from wantrain.metrics import commit
from wantrain.models import attention, fit
from wantrain.models.block import BlockMemory
from wantrain.models.encode import autocast, predict_velocity
from wantrain.models.loading import empty_weights, let_go, load_into
from wantrain.models.quantised import quantise
from wantrain.models.variants import VARIANTS, Variant, diffusers_config
from wantrain.terms import TEXT_LEN, Bucket, UserError

SMALL, WIDE = Bucket(81, 480, 480), Bucket(81, 480, 832)
TARGETS = ["attn_ffn"]
PUBLISHED = {("wan21_t2v_1b3", False): (1.407, 71.9), ("wan21_t2v_1b3", True): (2.099, 4.7),
             ("wan21_t2v_14b", True): (7.162, 16.3)}
"""Seconds and GiB of the field's row at SMALL, without and with checkpointing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `path` is floor, wantrain or peft (diffusers' blocks with PEFT's layers, where keep is all
    or inputs: its activation checkpointing).
    """

    model: str
    path: str
    keep: str = "all"
    base: str = ""
    swap: int = 0
    offload: bool = False
    bucket: Bucket = SMALL

    @property
    def name(self) -> str:
        parts = [self.model, str(self.bucket), self.path]
        if self.path != "floor":
            parts += [f"keep={self.keep}", f"base={self.base or 'dtype'}", f"swap={self.swap}",
                      f"offload={str(self.offload).lower()}"]
        return " ".join(parts)


def rows() -> Iterator[Row]:
    """The table, what matters most first."""
    small, middle, large = "wan21_t2v_1b3", "wan22_ti2v_5b", "wan21_t2v_14b"
    for model in (small, large):
        yield Row(model, "floor")
        yield Row(model, "wantrain", "attention")
        yield Row(model, "wantrain", "inputs")
        yield Row(model, "peft", "inputs")
    yield Row(small, "wantrain")
    yield Row(small, "peft")
    yield Row(large, "wantrain", "inputs", "int8", 20, offload=True)
    yield Row(large, "wantrain", "attention", "int8")
    yield Row(large, "wantrain", "attention", "fp8")
    yield Row(large, "wantrain", "inputs", swap=40)
    for path, keep in (("floor", "all"), ("wantrain", "all"), ("wantrain", "inputs"), ("peft", "all"),
                       ("peft", "inputs")):
        yield Row(middle, path, keep)
    for path, keep in (("floor", "all"), ("wantrain", "all"), ("wantrain", "attention")):
        yield Row(small, path, keep, bucket=WIDE)
    yield Row(large, "floor", bucket=WIDE)
    yield Row(large, "wantrain", "attention", bucket=WIDE)


def tiny(row: Row) -> Row:
    """The same row at a size for a CPU."""
    return replace(row, bucket=Bucket(5, 32, 32 if row.bucket == SMALL else 64), swap=min(row.swap, 2))


def variant_of(row: Row, is_tiny: bool) -> Variant:
    own = VARIANTS[row.model]
    if not is_tiny:
        return own
    return replace(own, architecture=replace(own.architecture, dim=32, num_heads=2, num_layers=2, ffn_dim=64,
                                             text_dim=32, freq_dim=32))


class RandomWeights:
    """What wantrain.models.loading reads a container through: tensors of these shapes, drawn when they are read."""

    path = Path("random weights")

    def __init__(self, module: torch.nn.Module) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def stored(self, *_: object) -> None:
        """Nothing lies in a byte already."""

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        return 0.02 * torch.randn(self._shapes[name], device=device, dtype=torch.bfloat16)


def model_of(row: Row, variant: Variant, device: torch.device, rank: int) -> Any:
    """The adapted transformer, ready to step."""
    with empty_weights():
        model = WanTransformer3DModel.from_config(diffusers_config(variant))
        quantise(model, row.base, may_use_bytes=True)
    weights: Any = RandomWeights(model)
    load_into(model, weights, lambda name: (name,), dtype=torch.bfloat16,
              device=torch.device("cpu") if row.swap else device,
              keep_float32=WanTransformer3DModel._keep_in_fp32_modules)
    model.requires_grad_(False).eval()
    if row.path == "wantrain":
        fit.fit(model, device, fit.NewAdapter(TARGETS, Spec(rank, rank), 0),
                memory=BlockMemory(row.keep, row.swap, row.offload))
    else:
        lora.inject(model, TARGETS, Spec(rank, rank), 0)
        if row.keep == "inputs":
            model.enable_gradient_checkpointing()
    return model if row.swap else model.to(device)


def fastest_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """In the block torch's attention prefers what our path prefers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < attention.HOPPER:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH], set_priority=True)


def step_of(row: Row, variant: Variant, device: torch.device, rank: int) -> tuple[Callable[[], object], str]:
    """A call that makes one step, and the kernel of attention."""
    if row.path == "floor":
        own, tokens = variant.architecture, row.bucket.num_tokens(variant.multiple_px)
        floor = Floor(own, tokens, TEXT_LEN, rank, device=device, dtype=torch.bfloat16)

        def least() -> None:
            with fastest_attention(device):
                floor.step(own.num_layers)

        return least, "the same order of preference"
    model = model_of(row, variant, device, rank)
    trainable = list(lora.trainable_parameters(model).values())
    optimizer, latents = torch.optim.AdamW(trainable, lr=1e-4), variant.latent_THW(row.bucket)
    noisy = torch.randn(1, variant.architecture.in_channels, *latents, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, TEXT_LEN, variant.architecture.text_dim, device=device, dtype=torch.bfloat16)

    def step() -> None:
        sigma = torch.full((1, latents[0]) if variant.task == "ti2v" else (1,), 0.5, device=device)
        with autocast(device, torch.bfloat16):
            predicted = predict_velocity(model, noisy, sigma, text)
        flow.loss_per_sample(predicted, noisy).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, attention.name_of(model, device)


def measured(row: Row, variant: Variant, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """One row's numbers: the median of --steps steps after one that does not count."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, kernel = step_of(row, variant, device, given.rank)
    taken: list[float] = []
    for _ in range(given.steps + 1):
        began = time.perf_counter()
        step()
        wait()
        taken.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) / costs.GIB if device.type == "cuda" else None
    return {"first_s": taken[0], "seconds": statistics.median(taken[1:]), "peak_gib": peak, "attention": kernel}


def planned(row: Row, variant: Variant, card: str | None, rank: int) -> dict[str, float]:
    """What `wantrain plan` says of a row of ours: GiB of tensors, and where the card is known, seconds."""
    if row.path != "wantrain":
        return {}
    job = costs.Job(variant, costs.MicroBatch(row.bucket), costs.Adapter(tuple(TARGETS), rank))
    policy = costs.MemoryPolicy(row.base or "dtype", (row.keep,) * job.num_blocks, row.swap, row.offload)
    found = {"planned_gib": costs.in_tensors(costs.device_parts(job, policy)) / costs.GIB}
    with contextlib.suppress(UserError):  # a card that nobody wrote down
        if card is not None:
            found["planned_s"] = costs.step(job, policy, costs.card_of(card), 1).seconds
    return found


def line_of(row: Row, card: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """A row with what is known of it before it is measured."""
    variant = variant_of(row, given.tiny)
    return {"row": row.name, **asdict(row), "bucket": str(row.bucket), "rank": given.rank,
            "tokens": row.bucket.num_tokens(variant.multiple_px), **planned(row, variant, card, given.rank)}


def tried(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a row; where it does not fit the card, that."""
    try:
        return measured(row, variant_of(row, given.tiny), torch.device(given.device), given)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"fault": f"out of memory: {str(error).partition(chr(10))[0]}"}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, times as seconds and as ratios to the floor of the same model and shape."""
    floors = {(one["model"], one["bucket"]): one["seconds"] for one in lines
              if one["path"] == "floor" and "seconds" in one}
    found = ["| row | tokens | s | x floor | GiB | planned s | planned GiB | published s, GiB |", "|---" * 8 + "|"]
    for one in lines:
        floor = floors.get((one["model"], one["bucket"]))
        ratio = one["seconds"] / floor if floor and "seconds" in one else None
        theirs = PUBLISHED.get((one["model"], one["keep"] == "inputs")) if one["path"] == "wantrain" and \
            one["bucket"] == str(SMALL) else None
        numbers = [told(one.get(key)) for key in ("seconds",)] + [told(ratio)] + [
            told(one.get(key)) for key in ("peak_gib", "planned_s", "planned_gib")]
        found.append(f"| {one['row']}{', ' + one['fault'] if 'fault' in one else ''} | {one['tokens']:,} | "
                     + " | ".join(numbers) + f" | {', '.join(map(str, theirs)) if theirs else ''} |")
    return "\n".join(found)


def told(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--seconds", type=float, default=570, help="begin no row after so many")
    parser.add_argument("--steps", type=int, default=3, help="that count, of each row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two blocks of width 32, to try the command itself")
    parser.add_argument("--predict", metavar="CARD", help="measure nothing: what the plan says of this card")
    given = parser.parse_args(arguments)
    wanted = [tiny(row) if given.tiny else row for row in rows()]
    if given.predict:
        print(f"predicted for {given.predict}, rank {given.rank}; nothing was measured\n"
              + table([line_of(row, given.predict, given) for row in wanted if row.path == "wantrain"]))
        return
    card = torch.cuda.get_device_name() if given.device == "cuda" else None
    where = {"device": card or given.device, "torch": torch.__version__, "commit": commit(), "tiny": given.tiny,
             "rank": given.rank}
    written = [json.loads(text) for text in given.out.read_text().splitlines()] if given.out.exists() else []
    lines = [one for one in written if where.items() <= one.items()]
    left = [row for row in wanted if row.name not in {one["row"] for one in lines}]
    began = time.perf_counter()
    with given.out.open("a") as file:
        while left and time.perf_counter() - began < given.seconds:
            row = left.pop(0)
            lines.append({**line_of(row, card, given), **tried(row, given), **where})
            let_go()
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            print(f"{time.perf_counter() - began:6.0f} s  {row.name}", flush=True)
    print(f"{where['device']}, torch {where['torch']}, commit {where['commit']}\n{table(lines)}")
    if left:
        print(f"{len(left)} rows are left: start the same command again")


if __name__ == "__main__":
    main()
