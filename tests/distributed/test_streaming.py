"""Streaming under two real gloo processes: every sample once an epoch, in an order that no stop or split changes.

The launched script is `wantrain` with a note of every sample that a process is given.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import moving_square, write_tar
from tests.runs import LAUNCH, numbers, state
from wantrain import cli, pictures

NUM_SHORT, NUM_LONG, BATCH, STEPS = 5, 4, 2, 9
"""Nine samples in batches of two: nine steps are two epochs, five steps of short windows and four of long ones."""

DRIVER = """
import json, sys

def noting(order, split, step, draws, fetch):
    made = plain(order, split, step, draws, fetch)
    with open(sys.argv[1], "a") as file:
        for batch, dealt in zip(made, batches.mine(order, split, step), strict=True):
            assert batch.ids == [window.name for _, window in dealt]
            for index, (_, window) in zip(batch.index_B, dealt, strict=True):
                file.write(json.dumps({"step": step, "process": split.process_index, "index": index,
                                       "clip": window.clip.id, "start_s": window.start_s,
                                       "shape": list(batch.latents_BCTHW.shape[1:])}) + "\\n")
    return made

if __name__ == "__main__":  # the workers that decode import this file as well
    from wantrain import cli
    from wantrain.data import batches

    plain, batches.micro_batches = batches.micro_batches, noting
    sys.exit(cli.main(sys.argv[2:]))
"""


def write_shards(folder: Path) -> Path:
    """Two shards of tiny clips: short ones of 8 frames, long ones of 12, mixed."""
    members: list[tuple[str, bytes]] = []
    for number in range(NUM_SHORT + NUM_LONG):
        pictures.write_mp4(folder / "x.mp4", moving_square(number, 8 if number < NUM_SHORT else 12, 32, 48), 16)
        members += [(f"{number}.mp4", (folder / "x.mp4").read_bytes()), (f"{number}.txt", b"sqstyle, no %d" % number)]
    for shard, part in enumerate((members[:6] + members[12:], members[6:12])):
        write_tar(folder / f"{shard}.tar", part)
    return folder / "*.tar"


def arguments(source: object, folder: Path, run: Path) -> list[str]:
    return ["recipe=demo_anime", "tracker=none", "~data.sources.regularisation", "data.heldout=null",
            f"data.sources.style.path={source}", f"run.dir={run}", f"data.cache_dir={folder / 'cache'}",
            "validation.every_steps=0", "data.num_frames=[5,9]", "data.resolutions=[[32,48]]",
            f"data.batch_size={BATCH}", "data.num_workers=1", "train.micro_batch_size=1", f"train.num_steps={STEPS}",
            "train.save_every=100", "lora.rank=2", "lora.alpha=2", "optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """stream(number of processes, run, overrides...) -> (run folder, what every process was given in this start)."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "driver.py").write_text(DRIVER)
    source = write_shards(folder)

    def call(num_processes: int, run: str, *overrides: str) -> tuple[Path, list[dict]]:
        notes = folder / f"notes_{len(list(folder.glob('notes_*')))}"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "ddp.yaml")]
        command = [sys.executable, *(launcher if num_processes == 2 else []), str(folder / "driver.py"), str(notes),
                   "train", *arguments(source, folder, folder / run), "data.mode=stream", "data.extract=random",
                   *overrides]
        paths = os.pathsep.join([str(LAUNCH.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((folder / run / "run.json").read_text())["num_processes"] == num_processes
        return folder / run, [json.loads(line) for line in notes.read_text().splitlines()]

    return call


@pytest.fixture(scope="module")
def whole(stream):
    return stream(2, "whole")


@pytest.fixture(scope="module")
def stopped(stream):
    return stream(2, "stopped", "train.num_steps=4")


def sequence(given: list[dict]) -> list[tuple]:
    """What was trained on in the order of the global batches, whoever did it."""
    return sorted((note["step"], note["index"], note["clip"], note["start_s"]) for note in given)


@pytest.mark.slow
@pytest.mark.long
def test_over_an_epoch_every_sample_is_seen_once_and_both_processes_are_at_one_bucket(whole):
    _, given = whole
    assert [(step, index) for step, index, _, _ in sequence(given)] == [(s, i) for s in range(STEPS)
                                                                       for i in range(BATCH)]
    assert Counter((note["step"], note["process"]) for note in given) == Counter(
        {(step, process): 1 for step in range(STEPS) for process in range(2)})
    shapes = [{tuple(note["shape"]) for note in given if note["step"] == step} for step in range(STEPS)]
    assert all(len(at_step) == 1 for at_step in shapes)
    assert sorted(shape[1] for at_step in shapes for shape in at_step) == [2] * NUM_SHORT + [3] * NUM_LONG
    for num_latent_frames, number in ((2, NUM_SHORT), (3, NUM_LONG)):
        clips = [clip for step, _, clip, _ in sequence(given) if {s[1] for s in shapes[step]} == {num_latent_frames}]
        assert len(clips) == 2 * number
        assert len(set(clips[:number])) == len(set(clips[number:])) == number
    assert {note["clip"] for note in given} == {
        f"style/{0 if i in (0, 1, 2, 6, 7, 8) else 1}.tar/{i}" for i in range(NUM_SHORT + NUM_LONG)}
    assert len({note["start_s"] for note in given}) == len(given)
    assert all(0 <= note["start_s"] <= 3 / 16 for note in given)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("num_processes", [2, 1])
def test_a_training_that_goes_on_sees_what_an_undisturbed_one_sees(stream, whole, stopped, num_processes):
    run = shutil.copytree(stopped[0], stopped[0].with_name(f"resumed_by_{num_processes}"))
    resumed, given = stream(num_processes, run.name)
    assert {step for step, *_ in sequence(stopped[1])} == set(range(4))
    assert sequence(stopped[1]) + sequence(given) == sequence(whole[1])
    assert json.loads((resumed / "run.json").read_text())["start_step"] == 4
    a, b = state(whole[0])[1], state(resumed)[1]
    assert a.keys() == b.keys()
    if num_processes == 2:
        assert torch.equal(numbers(whole[0], "loss"), numbers(resumed, "loss"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    else:
        torch.testing.assert_close(numbers(resumed, "loss"), numbers(whole[0], "loss"), rtol=2e-5, atol=0)


@pytest.fixture(scope="module")
def masked_set(tmp_path_factory):
    """Clips of two lengths with several captions; three share a bucket, with a mask that moves, a still one, none."""
    folder = tmp_path_factory.mktemp("masked")
    for number in range(4):
        pictures.write_mp4(folder / f"{number}.mp4", moving_square(number, 9 if number != 2 else 5, 32, 48), 16)
        (folder / f"{number}.txt").write_text(f"sqstyle, red, blue, number {number}")
        (folder / f"{number}.more.txt").write_text(f"another text of {number}")
    pictures.write_mp4(folder / "mask" / "0.mp4", moving_square(9, 9, 32, 48), 16)
    Image.linear_gradient("L").resize((48, 32)).save(folder / "mask" / "1.png")
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_streamed_losses_are_those_from_the_cache_with_masks_captions_and_tags(masked_set, tmp_path):
    own = ["data.tag_orders=2", "data.caption_dropout=0.2", "loss.mask_background=0.1", "train.num_steps=6",
           "train.micro_batch_size=2"]
    plain = arguments(masked_set, tmp_path, tmp_path / "cached") + own
    assert cli.main(["cache", *plain]) == 0
    assert cli.main(["train", *plain]) == 0
    streamed = arguments(masked_set, tmp_path, tmp_path / "streamed") + own + ["data.mode=stream"]
    assert cli.main(["train", *streamed]) == 0
    losses = [numbers(tmp_path / run, "loss") for run in ("cached", "streamed")]
    assert len(losses[0]) == 6
    assert torch.equal(*losses)
    unmasked = arguments(masked_set, tmp_path, tmp_path / "unmasked") + own + ["loss.mask_background=1"]
    assert cli.main(["train", *unmasked]) == 0
    assert not torch.equal(numbers(tmp_path / "unmasked", "loss"), losses[0])
