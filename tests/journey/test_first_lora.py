"""docs/first-lora.md: every command in it, in its order, on the tiny base with small clips and few steps."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests import tiny_tasks
from tests.conftest import write_clips
from wantrain import cli, config
from wantrain.config import asset

PAGE = Path(__file__).parents[2] / "docs" / "first-lora.md"
COMMANDS = [shlex.split(line)[1:] for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
            for line in block.splitlines()]
SMALL = ["model=tiny_wan", "memory.base=dtype", "data.num_frames=[5]", "data.resolutions=[[32,48]]",
         "data.max_tokens_per_clip=null", "data.allow_drops=true", "lora.rank=4", "lora.alpha=4", "data.batch_size=4",
         "train.micro_batch_size=2", "validation.every_steps=0", "tracker=none", "sampler.num_steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the reader has: my/clips, my/plain and my/films."""
    made = tmp_path_factory.mktemp("reader")
    write_clips(made / "my" / "clips", 6, "a square, number {}")
    write_clips(made / "my" / "plain", 2, "a plain square, number {}", 50)
    (made / "my" / "films").mkdir()
    shutil.copy(asset("demo/footage") / "01_ears-up.mp4", made / "my" / "films")
    return made


def steps_of(words):
    """Few steps; more where the page asks for more."""
    return [word if not word.startswith("train.num_steps=") else "train.num_steps=4" for word in words] + (
        [] if any(word.startswith("train.num_steps=") for word in words) else ["train.num_steps=2"])


def test_its_recipes_can_be_written_and_its_overrides_are_known(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "my", tmp_path / "my")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 17
    for verb, *words in COMMANDS:
        if verb == "new":
            assert cli.main([verb, *words]) == 0
        elif verb in cli.VERBS:
            known = " ".join(words).partition(" --gpus")[0]
            assert config.load(shlex.split(known)).data.heldout, words
    verbs = {verb for verb, *_ in COMMANDS}
    assert verbs == {"prepare", "new", "check", "report", "run", "sample", "inspect", "convert"}


@pytest.mark.slow
@pytest.mark.long
def test_its_commands_run_in_their_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    path = tiny_tasks.write_checkpoint(folder / "a14b", "tiny_wan_a14b")
    for verb, *words in COMMANDS:
        if "--gpus" in words:  # it becomes another program: tests/journey/test_run.py
            continue
        twin = ["model.variant=tiny_wan_a14b", f"model.path={path}"] if words[0] == "my_move" else []
        more = [*SMALL, *twin] if verb in cli.VERBS else []
        assert cli.main([verb, *(steps_of(words) if more else words), *more]) == 0, (words, capsys.readouterr().err)
    for name in ("my_style", "my_hero", "my_style_2"):
        assert (folder / "runs" / name / "export" / f"{name}.safetensors").is_file()
    for expert in ("high", "low"):
        assert (folder / "runs" / "my_move" / "export" / f"my_move_{expert}_noise.safetensors").is_file()
    assert (folder / "my_style_kohya.safetensors").is_file()
