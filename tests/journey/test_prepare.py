"""From one film to a LoRA: `wantrain prepare`, `new`, `run`."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from tests.tiny_captioner import write_model
from wantrain import cli
from wantrain.config import asset

pytestmark = pytest.mark.slow
SHOTS = ("01_ears-up", "04_rises-sky", "05_white-flowers", "09_butterfly-meadow", "12_empty-meadow", "16_from-above")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Six shots of the demo's footage, one after the other as one film."""
    folder = tmp_path_factory.mktemp("films")
    listed = "".join(f"file '{asset('demo/footage') / name}.mp4'\n" for name in SHOTS)
    (folder / "shots.txt").write_text(listed)
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-f", "concat", "-safe", "0", "-i", folder / "shots.txt",
                    "-crf", "18", folder / "film.mp4"], check=True)
    return folder / "film.mp4"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepare(*words, code=0):
    done = subprocess.run([sys.executable, "-m", "wantrain", "prepare", *words], capture_output=True, text=True,
                          check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_from_one_film_to_a_lora(film, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(film), "--trigger", "bunny style", "--name", "bunny", "--max-s", "2"]
    said = prepare(*words)
    manifest = tmp_path / "prepared" / "manifest.jsonl"
    found = rows(manifest)
    assert len(found) >= len(SHOTS)
    assert {row["caption"] for row in found} == {""}
    assert f"{len(found)} clips have no caption yet: no --captioner is given" in said
    assert "next: wantrain-review prepared/manifest.jsonl --trigger 'bunny style'" in said
    marked = [row | {"caption": f"bunny style, meadow number {i}", "keep": int(i != 3)} for i, row in enumerate(found)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in marked))
    said = prepare(*words)
    assert [(row["caption"], row["keep"]) for row in rows(manifest)] == [(r["caption"], r["keep"]) for r in marked]
    train, heldout = (rows(tmp_path / "prepared" / f"{side}.jsonl") for side in ("train", "heldout"))
    assert len(train) + len(heldout) == len(found)
    shots = [{row["id"].partition("#")[0] for row in side} for side in (train, heldout)]
    assert shots[1]
    assert not shots[0] & shots[1]
    new = shlex.split(re.search(r"next: wantrain (new .*)", said)[1])
    assert cli.main([*new, "--model", "tiny_wan"]) == 0
    assert re.search(r"1 of prepared/(train|heldout)\.jsonl are marked as out", capsys.readouterr().out)
    few = ["train.num_steps=2", "validation.every_steps=0", "lora.rank=4", "sampler.num_steps=2", "tracker=none",
           "data.resolutions=[[32,48]]", "evaluate.prompts=[a meadow]"]
    assert cli.main(["run", "bunny", *few]) == 0
    assert (tmp_path / "runs" / "bunny" / "export" / "bunny.safetensors").is_file()
    assert (tmp_path / "runs" / "bunny" / "report" / "report.html").is_file()


@pytest.mark.long
def test_with_a_captioner_one_command_leads_to_the_next(film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    said = prepare(str(film), "--trigger", "bunny style", "--captioner", "model", "--kind", "style")
    assert all(row["caption"].startswith("bunny style, ") for row in rows(tmp_path / "prepared" / "train.jsonl"))
    assert "next: wantrain new my_style --clips prepared/train.jsonl --heldout prepared/heldout.jsonl" in said


def test_what_a_tool_finds_wrong_ends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"no film at all" * 100)
    assert "hold out" not in prepare("film.mp4", "--trigger", "bunny style", code=2)
