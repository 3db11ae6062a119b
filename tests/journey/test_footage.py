"""The whole way, as a person with a folder of odd films goes it: every tool in order, and no file lost on it."""

import json
import re

import pytest

from data_tools import caption, filter, manifest, probe, split
from tests import odd_files
from tests.conftest import opened
from tests.tiny_captioner import write_model
from wantrain import cli
from wantrain.config import asset
from wantrain.data import decode
from wantrain.recipe.samples import Cached

pytestmark = [pytest.mark.slow, pytest.mark.long]

NUM_FRAMES = 5


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def counts(text, pattern):
    """The numbers of a line that must add up."""
    return list(map(int, re.search(pattern, text).groups()))


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Every odd file that the project can make, good and bad, and the real film of the demo."""
    folder = tmp_path_factory.mktemp("journey") / "footage"
    folder.mkdir()
    odd_files.make(folder, [*odd_files.FINE, *odd_files.FAULTY])
    (folder / "real").symlink_to(asset("demo/footage/heldout"))
    return folder


def test_from_a_folder_of_odd_films_to_a_trained_adapter(footage, capsys, monkeypatch):
    work = footage.parent
    monkeypatch.chdir(work)
    probed, spans, stills, every = (work / f"{name}.jsonl" for name in ("probe", "spans", "stills", "all"))
    before = {path: path.read_bytes() for path in footage.rglob("*") if path.is_file()}

    assert probe.main([str(footage), "--out", str(probed), "--timeout-s", "30"]) == 0
    found, fine, faulty, ignored = counts(
        capsys.readouterr().out, r"found (\d+) = (\d+) probed \+ (\d+) faulty \+ (\d+)")
    assert (found, faulty) == (fine + faulty + ignored, len(odd_files.FAULTY))
    rows = {row["path"].rpartition("/")[2]: row for row in lines(probed)}
    assert {name for name, row in rows.items() if row["fault"]} == {*odd_files.FAULTY}

    assert split.main([str(footage), "--out", str(spans), "--min-s", "0.3", "--timeout-s", "60"]) == 0
    said = capsys.readouterr().out
    assert "faulty" in said
    # images, and films that split does not cut, come in whole
    assert manifest.main(["build", str(footage), "--out", str(stills), "--probe", str(probed)]) == 0
    cut = {row["video"] for row in lines(spans)}
    whole = [row for row in lines(stills) if row["video"] not in cut]
    stills.write_text("".join(json.dumps(row) + "\n" for row in whole))
    assert manifest.main(["merge", str(spans), str(stills), "--out", str(every)]) == 0
    assert {row["video"].rpartition("/")[2] for row in lines(every)} == {
        name for name, row in rows.items() if not row["fault"]}

    write_model(work / "model")
    assert caption.main([str(every), "--model", str(work / "model"), "--dtype", "float32", "--trigger", "sqstyle",
                         "--max-tokens", "12", "--frames", "2", "--max-pixels", "4096", "--overwrite"]) == 0
    total, captioned, kept, bad = counts(
        capsys.readouterr().out, r"(\d+) rows = (\d+) captioned \+ (\d+) kept \+ (\d+)")
    assert (total, captioned, kept, bad) == (len(lines(every)), total, 0, 0)
    assert all(row["caption"].startswith("sqstyle, A red ball") for row in lines(every))

    assert filter.main([str(every)]) == 0
    measured = lines(every)
    assert all(isinstance(row["sharpness"], float) for row in measured)
    assert manifest.main(["check", str(every), "--trigger", "sqstyle"]) == 0, capsys.readouterr().out
    train, heldout = work / "train.jsonl", work / "heldout.jsonl"
    assert manifest.main(["split", str(every), "--train", str(train), "--heldout", str(heldout), "--num", "2"]) == 0
    capsys.readouterr()

    sharpness = sorted(row["sharpness"] for row in lines(train))
    sharpest = sharpness[len(sharpness) // 3]
    num_sharp = sum(value >= sharpest for value in sharpness)
    recipe = ["recipe=demo_anime", "tracker=none", "~data.sources.regularisation", "data.trigger=sqstyle",
              f"data.sources.style.path={train}", f"data.heldout={heldout}", "data.extract=uniform",
              f"data.num_frames=[1,{NUM_FRAMES}]", "data.resolutions=[[32,48],[48,32]]", "data.batch_size=2",
              "train.micro_batch_size=2", "train.num_steps=3", "validation.every_steps=0", "lora.rank=4",
              f"data.limits.sharpness=[{sharpest},null]", "optim.warmup_steps=0", "data.max_tokens_per_batch=48"]
    assert cli.main(["report", *recipe]) == 0
    clips, used, dropped = counts(capsys.readouterr().out, r"(\d+) clips = (\d+) used \+ (\d+) dropped")
    assert (clips, used, dropped) == (len(sharpness), num_sharp, clips - num_sharp)
    assert dropped > 5
    page = (work / "runs" / "demo_anime" / "report" / "data.html").read_text()
    assert page.count("<td>outside limits</td>") == dropped
    assert "read by PyAV, because decord would read them wrongly" in page
    assert cli.main(["cache", *recipe]) == 0
    assert cli.main(["train", *recipe]) == 0
    assert "trained 3 steps" in capsys.readouterr().out

    _, clips = opened(recipe)
    cached = Cached(clips)
    for planned in clips.planned:
        frames = decode.read_window(planned)
        assert frames.shape == (planned.bucket.num_frames, 3, planned.bucket.height, planned.bucket.width)
        assert cached.window(planned).latents_CTHW.isfinite().all()
    assert {path: path.read_bytes() for path in footage.rglob("*") if path.is_file()} == before
