"""From an empty folder with twelve clips to a LoRA and a page; stopped in every stage, and by several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import write_clips
from tests.distributed.forked import forking
from tests.runs import lines, same_bits, state

pytestmark = pytest.mark.slow
STAGES = ("check", "cache", "train", "export", "sample", "evaluate")
FEW = ["train.num_steps=8", "train.save_every=4", "validation.every_steps=4", "lora.rank=4", "sampler.num_steps=2",
       "sampler.resolution=[32,48]", "data.resolutions=[[32,48]]", "tracker=none"]
WANTRAIN = [sys.executable, "-m", "wantrain"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}


@pytest.fixture
def as_a_terminal_has_it():
    """A shell's background jobs begin with SIGINT ignored, which would stay in force."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


def call(folder, *words, code=0):
    done = subprocess.run([*WANTRAIN, *words], cwd=folder, capture_output=True, text=True, timeout=500, check=False,
                          env=ENVIRONMENT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with twelve clips, and a recipe for them."""
    made = tmp_path_factory.mktemp("home")
    write_clips(made / "clips", 12, "sqstyle, square number {}")
    said = call(made, "new", "sq", "--model", "tiny_wan", "--clips", "clips", "--trigger", "sqstyle")
    assert said.splitlines()[-1] == "next: wantrain run sq"
    return made


@pytest.fixture(scope="module")
def whole(folder):
    """What an undisturbed run says, and its folder."""
    return call(folder, "run", "sq", *FEW), folder / "runs" / "sq"


def begun(text):
    """The stages that a run began, and those that it passed by."""
    marks = [line.partition("] ")[2] for line in text.splitlines() if line.startswith("[")]
    return [mark for mark in marks if ":" not in mark], [mark.partition(":")[0] for mark in marks if ":" in mark]


def test_two_commands_lead_to_a_lora_and_a_page(whole):
    said, run = whole
    assert begun(said) == ([*STAGES], [])
    assert said.splitlines()[-1] == "done: runs/sq/export/sq.safetensors, runs/sq/report/report.html"
    assert (run / "export" / "sq.safetensors").stat().st_size > 1000
    assert "sqstyle" in (run / "report" / "report.html").read_text()
    assert len(list((run / "samples").glob("*.mp4"))) == 6
    assert [line["step"] for line in lines(run)] == list(range(1, 9))
    assert "train     not known yet" in said


@pytest.mark.long
def test_a_second_time_only_what_is_no_longer_right_is_made_again(whole, folder):
    _, run = whole
    shutil.copytree(run, folder / "runs" / "kept")
    exported = run / "export" / "sq.safetensors"
    written_ns = exported.stat().st_mtime_ns
    said = call(folder, "run", "sq", *FEW)
    assert begun(said)[1] == ["export", "sample", "evaluate"]
    assert "train     done already" in said
    assert exported.stat().st_mtime_ns == written_ns
    (run / "samples" / "000_strength_1.mp4").write_bytes(b"cut off")
    assert begun(call(folder, "run", "sq", *FEW))[1] == ["export", "evaluate"]
    assert (run / "samples" / "000_strength_1.mp4").stat().st_size > 100
    exported.write_bytes(exported.read_bytes()[:-8])
    said = call(folder, "run", "sq", *FEW)
    assert begun(said)[1] == ["sample", "evaluate"]
    assert exported.read_bytes() == (folder / "runs" / "kept" / "export" / "sq.safetensors").read_bytes()
    said = call(folder, "run", "sq", *FEW, "sampler.seeds=[1]", "train.num_steps=9")
    assert begun(said)[1] == []
    assert "train     about " in said
    assert "sample    about " in said
    shutil.rmtree(run)
    (folder / "runs" / "kept").rename(run)  # for the tests that follow


@pytest.mark.long
def test_a_stage_that_fails_ends_it_with_its_own_message(folder):
    said = subprocess.run([*WANTRAIN, "run", "sq", *FEW, "run.name=bad", "sampler.guidance=1e38"], cwd=folder,
                          text=True, capture_output=True, check=False, env=ENVIRONMENT)
    assert said.returncode == 2
    assert begun(said.stdout) == (["check", "cache", "train", "export", "sample"], [])
    assert "error: no video of prompt" in said.stderr


@pytest.mark.usefixtures("as_a_terminal_has_it")
def test_stopped_in_every_stage_the_same_command_goes_on(whole, folder, tmp_path):
    """Ctrl-C as soon as a stage has begun, in one stage after the other; in the end the run is that of one that nothing
    stopped. Forks of one process: its imports would take most of the time.
    """
    run, recipes = tmp_path / "run", folder / "recipes"
    command = ["run", f"recipe={recipes / 'sq.yaml'}", *FEW, f"data.sources.clips.path={recipes / 'sq.train.jsonl'}",
               f"data.heldout={recipes / 'sq.heldout.jsonl'}", f"run.dir={run}", f"data.cache_dir={tmp_path / 'cache'}"]
    with forking() as forker:
        for number, stage in enumerate(STAGES, 1):
            log = tmp_path / f"{stage}.log"
            pid, = forker.start(command, log, 1, None)
            begins = run / "metrics.jsonl" if stage == "train" else log  # before it listens, it is a stop in loading
            while not begins.is_file() or f"[{number}/6] {stage}\n" not in log.read_text():
                assert not forker.wait([pid], 0.02), log.read_text()
            os.kill(pid, signal.SIGINT)
            assert forker.wait([pid]) == {pid: 130}, log.read_text()
            assert "next: wantrain run recipe=" in log.read_text()
        forker.run(command, tmp_path / "last.log", 1, None)
    assert (tmp_path / "last.log").read_text().splitlines()[-1].startswith("done: ")
    _, undisturbed = whole
    assert same_bits(state(run)[1], state(undisturbed)[1])
    assert {path.name for path in (run / "samples").iterdir()} == {
        path.name for path in (undisturbed / "samples").iterdir()}


@pytest.mark.long
def test_two_processes_share_what_can_be_shared(folder, tmp_path):
    own = [*FEW, "train.micro_batch_size=2", f"data.cache_dir={tmp_path / 'cache'}"]
    said = call(folder, "run", "sq", *own, f"run.dir={tmp_path / 'two'}", "--gpus", "2")
    assert begun(said) == ([*STAGES], [])
    assert json.loads((tmp_path / "two" / "run.json").read_text())["num_processes"] == 2
    assert "report: " in said
    other = (tmp_path / "two" / "logs" / "process_1.log").read_text()
    assert "exported" not in other
    for stage, share, number in (("samples", 3, 6), ("report", 7, 15)):
        assert len(list((tmp_path / "two" / stage).glob("*.mp4"))) == number
        assert f"process 1 makes {share} of {number} videos" in other
    again = call(folder, "run", "sq", *own, f"run.dir={tmp_path / 'two'}", "--gpus", "2")
    assert begun(again)[1] == ["export", "sample", "evaluate"]
    call(folder, "train", "sq", *own, f"run.dir={tmp_path / 'one'}")
    for alone, shared in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert alone["loss"] == pytest.approx(shared["loss"], rel=2e-5)
