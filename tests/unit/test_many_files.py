"""Four times as many files are four times as much work, for every tool: counted in calls, which no neighbour slows."""

import cProfile
import pstats

import pytest
from PIL import Image

from data_tools import caption, command, dividing
from data_tools import manifest as tool
from data_tools.rows import sound_entries
from wantrain.data import manifest, plan
from wantrain.data.cache import Cache, missing
from wantrain.terms import Bucket, MediaInfo

FEW, MANY = 60, 240


def folder_of(folder, number):
    """Images with two captions each, some with names that are not ASCII."""
    folder.mkdir(exist_ok=True)
    for i in range(number):
        name = f"{'映画' if i % 5 == 0 else 'clip'} {i:04d}"
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"thing {i}")
        (folder / f"{name}.2.txt").write_text(f"another word for {i}")
    return folder


def run(main, *arguments):
    assert main([str(argument) for argument in arguments]) == 0


def built_again(folder, out):
    for _ in range(2):
        run(tool.main, "build", folder, "--out", out / "built.jsonl")


def captioned(folder, out):
    for source in ("sidecars", "names"):
        run(caption.main, folder, "--from", source, "--overwrite", "--out", out / f"{source}.jsonl")
        run(caption.main, out / f"{source}.jsonl", "--from", source, "--overwrite")


def merged(folder, out):
    run(tool.main, "build", folder, "--out", out / "a.jsonl")
    run(tool.main, "merge", out / "a.jsonl", out / "a.jsonl", "--out", out / "b.jsonl")


def divided(folder, out):
    run(tool.main, "build", folder, "--out", out / "d.jsonl")
    rows, = sound_entries([out / "d.jsonl"])
    dividing.divide(rows, dividing.Rule(0.1, None, 0, False), {row.clip: False for row in rows[::2]})
    assert not tool._notes(rows)[1:]


def planned(folder, out):
    clips = manifest.read(manifest.ClipSource("many", str(folder)))
    found = {path: MediaInfo(path.name, 0.0, 4, 4, "image", 1) for path in plan.files_of(clips)}
    made = plan.place(clips, found, plan.Rules([Bucket(1, 32, 32)], 16.0))
    assert made.num_found == len(clips) == len(made.used)
    entries = Cache(out, "v", "t", "").entries(made.used, [c.caption for c in clips])
    assert len(missing(entries)) == len(entries) == 2 * len(clips)


@pytest.mark.parametrize("work", [built_again, captioned, merged, divided, planned])
def test_the_work_grows_as_the_files_do(tmp_path, work, capsys):
    calls = []
    for name, number in (("warm", 2), ("few", FEW), ("many", MANY)):
        folder = folder_of(tmp_path / name, number)
        assert len(command.find_files([folder])[0]) == number
        (tmp_path / f"{name} out").mkdir()
        profile = cProfile.Profile()
        profile.runcall(work, folder, tmp_path / f"{name} out")
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[2] < 1.1 * MANY / FEW * calls[1]
