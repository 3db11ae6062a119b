"""Blocks that wait on the host in the mapped file itself, where their copies would take more memory than there is."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.runs import losses
from wantrain import costs, engine, lora
from wantrain.costs import Adapter, Fixed, Job, MemoryPolicy, MicroBatch
from wantrain.lora import Spec
from wantrain.models import base, block
from wantrain.models.block import BlockMemory
from wantrain.models.encode import predict_velocity
from wantrain.models.swap import Swap
from wantrain.models.variants import VARIANTS
from wantrain.terms import Bucket

CPU = torch.device("cpu")


def files_at(addresses: list[int]) -> set[str]:
    """The files that are mapped at these addresses of this process, by the kernel's own list."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[5] if len(line) > 5 else "") for line in lines]
    return {Path(path).suffix for address in addresses for start, end, path in spans if start <= address < end}


def test_weights_of_the_stored_dtype_stay_in_the_file_until_they_are_staged() -> None:
    """The tiny base holds bfloat16."""
    homes: dict[bool, set[str]] = {}
    answers: list[torch.Tensor] = []
    tiny = base.find(VARIANTS["tiny_wan"], "embedded", {})
    for mapped in (False, True):
        transformer = tiny.transformer(torch.bfloat16, CPU, mapped=mapped)
        lora.inject(transformer, ["attn"], Spec(2, 2.0), 0)
        swap = block.train_blocks(transformer, BlockMemory("inputs", 3, mapped=mapped), CPU)
        assert swap is not None
        torch.manual_seed(0)
        noisy, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 512, transformer.config.text_dim)
        answers.append(predict_velocity(transformer, noisy.bfloat16(), torch.tensor([0.5]), text.bfloat16()))
        answers[-1].float().sum().backward()
        homes[mapped] = files_at([home.data_ptr() for own in swap.blocks for _, _, home in own.owners])
    assert torch.equal(*answers)
    assert homes == {False: {""}, True: {".safetensors"}}


def test_a_training_with_too_little_host_memory_has_no_arena(wantrain, tmp_path, monkeypatch):
    swaps: list[Swap] = []
    own = block.swap_weights
    monkeypatch.setattr(block, "swap_weights", lambda *given: (swaps.append(own(*given)), swaps[-1])[1])
    monkeypatch.setattr(engine, "host_bytes", lambda: 0.0)
    for swap in (0, 3):
        assert wantrain("train", f"run.dir={tmp_path / str(swap)}", f"memory.swap={swap}", "train.num_steps=2") == 0
    assert losses(tmp_path / "3") == losses(tmp_path / "0")
    assert [one.arena for one in swaps] == [None]


def test_what_is_chosen_for_little_host_memory_counts_that():
    """14B in bfloat16 on 32 GB, with 24 GB of host memory, which its 26 GiB would not fit."""
    job = Job(VARIANTS["wan21_t2v_14b"], MicroBatch(Bucket(81, 480, 832)), Adapter(("attn_ffn",), 32))
    swapped, host = MemoryPolicy("dtype", ("inputs",) * 40, 40), 24 * costs.GIB
    assert costs.stays_mapped(job, swapped, host)
    assert not costs.stays_mapped(job, swapped, 128 * costs.GIB)
    assert not costs.stays_mapped(job, MemoryPolicy("int8", ("inputs",) * 40, 40), host)  # no file need hold it so
    block_bytes = 2 * (8 * 5120**2 + 2 * 5120 * 13824)
    assert costs.host_parts(job, swapped)["streamed blocks"] == 40 * block_bytes
    assert costs.host_parts(job, swapped, mapped=True)["streamed blocks"] == 2 * block_bytes
    choice = costs.choose(job, costs.card_of("32gb"), 32 * costs.GIB, host, Fixed("dtype", offload=False))
    assert choice.best is not None
    assert choice.best.policy.swap > 0
