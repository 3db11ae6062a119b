"""What `wantrain sample` leaves: files of each format, what a video says of itself, and the same video again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wantrain import pictures
from wantrain.config import load, load_yaml, to_yaml
from wantrain.recipe import records
from wantrain.terms import UserError


def write_lora(path: Path, seed: int) -> Path:
    """A universal file with an effect on the embedded base."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"diffusion_model.blocks.{block}.self_attn.{leaf}.lora_{side}.weight": torch.randn(
        shape, generator=generator) / 8 for block in range(2) for leaf in "qv"
        for side, shape in (("A", (4, 192)), ("B", (192, 4)))}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def sampled(wantrain, tmp_path: Path) -> Path:
    """Two prompts from a file, one LoRA at 0.8, in every format: the folder of samples."""
    (tmp_path / "prompts.txt").write_text("# of the test\nsqstyle, a square\n\n  sqstyle, two squares, \u00e9t\u00e9\n")
    lora = write_lora(tmp_path / "a.safetensors", 0)
    assert wantrain("sample", f"sampler.prompts={tmp_path / 'prompts.txt'}", f"sampler.loras=[{lora}=0.8]",
                    "sampler.strengths=[0,1]", "sampler.seeds=[3]", "sampler.formats=[webp,png]",
                    "sampler.num_frames=9") == 0
    return tmp_path / "run" / "samples"


def test_every_format_has_the_videos_frames_rate_and_settings(sampled: Path) -> None:
    names = [f"{number}_{column}" for number in ("000", "001") for column in ("base", "strength_1")]
    assert {path.name for path in sampled.iterdir()} == {
        "contact_sheet.png", "results.json", *(f"{name}.{end}" for name in names for end in ("mp4", "webp", "png",
                                                                                            "json"))}
    with av.open(str(sampled / "001_strength_1.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, sum(1 for _ in container.decode(video=0))) == (16, 9)
    with Image.open(sampled / "001_strength_1.webp") as webp:
        assert (webp.n_frames, webp.size) == (9, (48, 32))
        times = []
        for frame in range(webp.n_frames):
            webp.seek(frame)
            webp.load()
            times.append(webp.info["duration"])
    assert sum(times) == round(1000 * 9 / 16)
    with Image.open(sampled / "001_strength_1.png") as sheet:
        assert sheet.width > 3 * 200, "frames 0, 4 and 8"
    record = json.loads((sampled / "001_strength_1.json").read_text())
    assert json.loads(pictures.read_comment(sampled / "001_strength_1.mp4")) == record
    assert (record["prompt"], record["seed"], record["strength"]) == ("sqstyle, two squares, \u00e9t\u00e9", 3, 1)
    assert record["loras"][0][:3] == ["", str(sampled.parents[1] / "a.safetensors"), 0.8]
    assert load_yaml(record["config"]).sampler.prompts == ["sqstyle, a square", record["prompt"]]


def test_a_video_is_made_again_to_the_bit_from_itself_alone(sampled: Path, wantrain, capsys, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").unlink()
    moved = Path(shutil.copy(sampled / "001_strength_1.mp4", tmp_path / "mine.mp4"))
    capsys.readouterr()
    assert wantrain("sample", "--like", str(moved), base=[]) == 0
    assert "mine_again: the same frames as" in capsys.readouterr().out
    again = json.loads((tmp_path / "mine_again.json").read_text())
    assert again == json.loads(pictures.read_comment(moved)) == json.loads(pictures.read_comment(
        tmp_path / "mine_again.mp4"))
    other = json.loads((sampled / "001_base.json").read_text())["frames"]
    assert again["frames"] != other
    assert wantrain("sample", "--like", str(sampled / "001_base.webp"), base=[]) == 0  # from the file beside it
    assert "the same frames as" in capsys.readouterr().out


def test_what_cannot_be_made_again_is_told(sampled: Path, wantrain, capsys, tmp_path: Path) -> None:
    path = sampled / "000_strength_1.json"
    record = json.loads(path.read_text())
    changed = {**record, "frames": "00", "made_by": {**record["made_by"], "device": "NVIDIA H200"}}
    path.write_text(json.dumps(changed))
    assert wantrain("sample", "--like", str(path), base=[]) == 0
    assert "not the same bits as" in (told := capsys.readouterr().out)
    assert "device NVIDIA H200 and now" in told
    write_lora(tmp_path / "a.safetensors", 1)
    assert wantrain("sample", "--like", str(sampled / "001_strength_1.mp4"), base=[]) == 2
    assert "is not the file that the video was made with" in capsys.readouterr().err
    pictures.write_mp4(tmp_path / "foreign.mp4", torch.zeros(5, 3, 32, 48, dtype=torch.uint8), 16)
    for name in ("foreign.mp4", "absent.mp4", "foreign.webp"):
        with pytest.raises(UserError, match="--like"):
            records.read(tmp_path / name)
    assert wantrain("sample", "--like", str(path), "train.seed=1", base=[]) == 2


def test_a_config_comes_back_from_its_yaml(arguments: list[str]) -> None:
    config = load([*arguments, "sampler.profile=comfy", "sampler.formats=[png]", "data.limits={motion: [1, null]}"])
    assert load_yaml(to_yaml(config)) == config


def test_a_file_of_prompts_that_cannot_be_read_is_named(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts: .*absent\.txt cannot be read"):
        load([*arguments, f"sampler.prompts={tmp_path / 'absent.txt'}"])
    (tmp_path / "some.txt").write_text("one\n#two\nthree\n")
    loaded = load([*arguments, f"evaluate.prompts=[zero, {tmp_path / 'some.txt'}]"])
    assert loaded.evaluate.prompts == ["zero", "one", "three"]
