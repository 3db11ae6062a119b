"""A made-up checkpoint, added as docs/new-model.md says and in no other way, trains, exports and is sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import arguments_for
from tests.tiny_tasks import write_checkpoint, write_set
from wantrain import cli
from wantrain.models import conditioning, task_media
from wantrain.models.conditioning import Condition, Encoders, Frames
from wantrain.models.variants import VARIANTS
from wantrain.terms import WINDOW, Bucket


def encode_last(encoders: Encoders, frames: Frames, bucket: Bucket) -> Condition:
    """A model that is given its last frame: 16 channels of that frame in every place."""
    last = frames.get("last")
    shape = (bucket.num_frames - 1) // 4 + 1
    if last is None:
        return {"channels": torch.zeros(16, shape, bucket.height // 8, bucket.width // 8)}
    return {"channels": encoders.latents(last).expand(-1, shape, -1, -1).contiguous()}


@pytest.mark.slow
def test_a_made_up_checkpoint_is_a_row_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = VARIANTS["tiny_wan_i2v_a14b"]
    made_up = replace(like, name="tiny_wan_backwards", task="backwards", boundary=None,
                      architecture=replace(like.architecture, in_channels=32))
    monkeypatch.setitem(VARIANTS, made_up.name, made_up)
    monkeypatch.setitem(conditioning.ENCODE, "backwards", encode_last)
    monkeypatch.setitem(task_media._TASKS, "backwards", task_media.TaskMedia(
        inputs_needed=("last",), inputs=("last",), encoded=(WINDOW,)))
    path, clips = write_checkpoint(tmp_path / "checkpoint", made_up.name), write_set(tmp_path / "clips", made_up.name)
    own = [*arguments_for(clips, tmp_path / "cache", tmp_path / "run"), f"model.variant={made_up.name}",
           f"model.path={path}", "train.num_steps=3", "optim.lr=0.02", "data.num_frames=[1,5]"]
    for verb in ("check", "cache", "train", "export", "sample"):
        assert cli.main([verb, *own]) == 0, verb
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(
        tmp_path / "run" / "export" / "demo_anime.safetensors").items() if "lora_B" in name)
    assert list((tmp_path / "run" / "samples").glob("*.mp4"))
