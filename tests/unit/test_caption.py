"""Captions by a tiny real model: what it sees is the span, what it says becomes a caption or a named fault."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import caption, captioner
from tests import odd_files
from tests.tiny_captioner import SAID, TEMPLATE, write_model
from wantrain import journal
from wantrain.data import decode, manifest
from wantrain.jobs import Ending, Failure

__all__ = ["decode"]  # loaded with this module, and not while a worker's first clip is timed
SHOTS = (24, 24, 24)
LOOKING = ["--frames", "3", "--max-tokens", "12", "--batch-size", "2", "--jobs", "1"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_folder, here):
    """One that says the sentence; jobs run in this process."""
    return model_folder


@pytest.fixture(scope="module")
def film_FHWC():
    return odd_files.film_of_shots(SHOTS)


@pytest.fixture
def set_(tmp_path, film_FHWC):
    """A film with three spans, one of them captioned, and a picture: the manifest."""
    odd_files.write_film(tmp_path / "film.mp4", film_FHWC, pix_fmt="yuv444p", **odd_files.LOSSLESS)
    Image.fromarray(film_FHWC[0]).save(tmp_path / "still.png")
    rows = [{"video": "film.mp4", "start_s": float(i), "end_s": i + 1.0, "id": f"film.mp4@{i}.000#1",
             "caption": "by hand" if i == 1 else "", "motion": 1.5 * i, "note": ["foreign", None]} for i in range(3)]
    rows[2]["video"] = str(tmp_path / "film.mp4")
    return write_rows(tmp_path / "m.jsonl", [*rows, {"video": "still.png", "caption": ""}])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def captions(path):
    return [row["caption"] for row in read_rows(path)]


@pytest.fixture
def here(monkeypatch):
    """Jobs run in this process."""

    def in_workers(function, jobs, number, timeout_s, **_):
        yield from ((job, function(job), None) for job in jobs)

    monkeypatch.setattr(journal, "in_workers", in_workers)


@pytest.fixture
def asked(monkeypatch):
    """Everything that reaches the model's generate."""
    import transformers

    calls = []
    generate = transformers.GenerationMixin.generate

    def spy(self, **inputs):
        calls.append(inputs | {"dtype": self.dtype})
        return generate(self, **inputs)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", spy)
    return calls


def call(*arguments):
    return caption.main([*LOOKING, *map(str, arguments)])


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_without_a_caption_get_one_and_the_rest_stays(set_, model, asked, capsys):
    before, media = read_rows(set_), files_of(set_.parent)
    assert call(set_, "--model", model, "--trigger", "wrds") == 0
    assert captions(set_) == [f"wrds, {SAID}", "by hand", f"wrds, {SAID}", f"wrds, {SAID}"]
    assert [row | {"caption": ""} for row in read_rows(set_)] == [row | {"caption": ""} for row in before]
    assert {path: data for path, data in files_of(set_.parent).items() if path != set_} == {
        path: data for path, data in media.items() if path != set_}
    out = capsys.readouterr().out
    assert "4 rows = 3 captioned + 1 kept + 0 faulty" in out
    assert "1 of those kept are without the trigger, such as film.mp4@1.000#1" in out
    assert [(len(inputs["input_ids"]), inputs["dtype"]) for inputs in asked] == [(n, torch.bfloat16) for n in (2, 1)]
    first = set_.read_bytes()
    assert call(set_, "--model", model, "--trigger", "wrds") == 0
    assert (set_.read_bytes(), len(asked)) == (first, 2)
    assert "4 rows = 0 captioned + 4 kept + 0 faulty" in capsys.readouterr().out


def test_the_manifest_with_captions_is_what_training_reads(set_, model):
    rows = [{k: v for k, v in row.items() if k != "note"} for row in read_rows(set_)]
    call(write_rows(set_, rows), "--model", model)
    read = manifest.read(manifest.ClipSource("set", str(set_)))
    assert [clip.caption for clip in read] == [SAID, "by hand", SAID, SAID]


def test_overwrite_makes_all_anew_without_doubling_the_trigger(set_, model, capsys):
    assert call(set_, "--from", "caption", "--trigger", "wrds", "--overwrite") == 0
    assert captions(set_) == ["", "wrds, by hand", "", ""]
    assert "4 rows = 1 captioned + 0 kept + 3 faulty" in capsys.readouterr().out
    write_rows(set_, [row | {"captions": ["further"]} for row in read_rows(set_)[1:2]])
    for _ in range(2):
        assert call(set_, "--from", "caption", "--trigger", "wrds", "--overwrite") == 0
        assert [(row["caption"], row["captions"]) for row in read_rows(set_)] == [("wrds, by hand", ["wrds, further"])]
    assert call(set_, "--model", model, "--overwrite", "--trigger", "wrds", "--form", "{caption} In {trigger}.") == 0
    assert captions(set_) == [f"{SAID} In wrds."]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_model_is_given_the_pictures_of_each_span(set_, film_FHWC, here, asked, family):
    """3 parts of 24 frames: their middles are frames 4, 12 and 20 of each shot."""
    folder = write_model(set_.parent / "model", family=family)
    call(set_, "--model", folder, "--overwrite", "--batch-size", "4", "--dtype", "float32", "--prompt", "say {medium}")
    settings = captioner.Settings("model", "", "", "", "", "", 3, 1 << 20, 1, 1, False)
    processor = captioner.Captioner(str(folder), settings, with_weights=False).processor
    assert [inputs["dtype"] for inputs in asked] == [torch.float32]
    told, pixels = processor.batch_decode(asked[0]["input_ids"]), asked[0]["pixel_values"]
    wanted = [film_FHWC[24 * shot + frame] for shot in range(3) for frame in (4, 12, 20)] + [film_FHWC[0]]
    expected = processor.image_processor([Image.fromarray(f) for f in wanted], return_tensors="pt")["pixel_values"]
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().mean() < 0.02
    others = expected.reshape(len(wanted), -1)
    assert torch.cdist(pixels.reshape(len(wanted), -1), others).argmin(1).tolist() == list(range(len(wanted)))
    assert all(f"{time} s:<|vision_start|><|image_pad|>" in told[2] for time in (0.2, 0.5, 0.8))  # those of the span
    assert "say video" in told[2]
    assert "say picture" in told[3]
    assert " s:" not in told[3]


def test_the_likeliest_words_are_taken_whatever_the_model_folder_says(set_, model, asked):
    call(set_, "--model", model)
    call(set_, "--model", model, "--overwrite")
    assert captions(set_) == [SAID] * 4
    assert not any(inputs["do_sample"] for inputs in asked)


def see(path, span=(0.0, np.inf), num_frames=4, **job):
    return captioner.see(captioner.Job(path, *span, num_frames, **{"max_pixels": 1 << 20} | job))


@pytest.mark.parametrize(("span", "number", "frames"), [
    ((0.0, np.inf), 3, [12, 36, 60]), ((1.0, 2.0), 2, [30, 42]), ((0.0, 1.0), 1, [12]), ((2.5, 9.0), 2, [63, 69]),
    ((0.5, 0.5 + 3 / 24 - 1e-4), 8, [12, 13, 14]), ((1.02, 1.03), 8, [24])])
def test_frames_lie_evenly_in_their_span(set_, film_FHWC, span, number, frames):
    seen = see(set_.parent / "film.mp4", span, number)
    assert [round(t * 24) for t in seen.times_s] == frames
    assert seen.frames_FHWC.shape == (len(frames), 64, 96, 3)
    assert np.abs(seen.frames_FHWC.astype(int) - film_FHWC[frames]).mean() < 3


def test_a_large_frame_is_made_smaller_and_keeps_its_shape(tmp_path, film_FHWC):
    path = odd_files.write_film(tmp_path / "film.mp4", film_FHWC)
    assert see(path, max_pixels=96 * 64 // 4).frames_FHWC.shape == (4, 32, 48, 3)
    planned = see(path, max_pixels=96 * 64 // 4, is_read=False)
    assert (planned.shape_FHW, planned.frames_FHWC) == ((4, 32, 48), None)


def test_what_cannot_be_seen_is_a_fault_named_by_clip(tmp_path, film_FHWC, model, capsys):
    odd_files.make(tmp_path, ["empty.mp4", "notes.png", "garbage.mkv", "sound.mp4", "a link.mp4", "cut off.jpg"])
    odd_files.write_film(tmp_path / "film.mp4", film_FHWC)
    Image.new("RGB", (2000, 4)).save(tmp_path / "strip.png")
    names = [p.name for p in sorted(tmp_path.iterdir())]
    rows = [{"video": name, "caption": ""} for name in names]
    rows += [{"video": "film.mp4", "start_s": 3.5, "end_s": 4.0, "id": "after its end"},
             {"video": "s3://bucket/far.mp4", "caption": ""}, {"video": "gone.mp4"}]
    path = write_rows(tmp_path / "m.jsonl", rows)
    assert call(path, "--model", model) == 0
    out = capsys.readouterr().out
    assert "11 rows = 1 captioned + 0 kept + 10 faulty" in out
    for fault in ("empty.mp4: ", "a text file", "Invalid data found", "no video", "No such file", "truncated",
                  "a strip of 2000x4 px", "after its end: ", "begins at 3.5 s, the film ends at 3 s",
                  "far.mp4: on another machine", "gone.mp4: "):
        assert fault in out
    assert [row.get("caption", "") for row in read_rows(path)] == [SAID if r["video"] == "film.mp4" and "id" not in r
                                                                   else "" for r in rows]


def test_a_dry_run_shows_everything_and_leaves_no_trace(set_, model, asked, monkeypatch, capsys):
    before = files_of(set_.parent)
    with monkeypatch.context() as without_weights:
        without_weights.setattr(captioner, "_load_model", None)
        without_weights.setattr("wantrain.data.decode.read_clip", None)
        assert call(set_, "--model", model, "--kind", "style", "--dry-run") == 0
    assert files_of(set_.parent) == before
    out = capsys.readouterr().out
    assert "film.mp4@2.000#1: frames at 2.17 2.50 2.83 s, 96x64 px, about " in out
    assert "film.mp4@1.000#1" not in out
    assert "4 rows = 3 captioned + 1 kept + 0 faulty; a dry run: nothing was written" in out
    call(set_, "--model", model, "--kind", "style", "--batch-size", "1")
    processor = captioner._load_processor(str(model))
    prompts = [processor.batch_decode(inputs["input_ids"])[0] for inputs in asked]
    marks = [caption.re.sub(r"(<.image_pad.>)+", r"\1", prompt) for prompt in prompts]
    assert marks[0] in out
    assert marks[2] in out
    for line, inputs in zip([line for line in out.splitlines() if "tokens +" in line], asked, strict=True):
        assert f"about {inputs['input_ids'].numel()} tokens + 12" in line


def test_a_killed_call_goes_on_with_the_batch_that_it_lost(set_, model, monkeypatch, capsys):
    rows = [row | {"caption": ""} for row in read_rows(set_)]
    write_rows(set_, rows)
    ask, asked = captioner.Captioner.ask, []

    def killed(self, jobs, seen):
        if stops and stops[0] == len(asked):
            stops.pop(0)
            raise KeyboardInterrupt
        asked.extend(jobs)
        return ask(self, jobs, seen)

    monkeypatch.setattr(captioner.Captioner, "ask", killed)
    stops = [1, 2]
    assert call(set_, "--model", model, "--batch-size", "1") == 130
    assert "what was finished is kept" in capsys.readouterr().err
    assert read_rows(set_) == rows
    memory = set_.with_name("m.jsonl.journal")
    with memory.open("a") as file:
        file.write('{"key": "cut o')
    assert call(set_, "--from", "names", "--out", set_) == 0  # no business of the model's
    write_rows(set_, rows)
    assert call(set_, "--model", model, "--batch-size", "1") == 130
    assert call(set_, "--model", model, "--trigger", "new") == 0  # what is done to answers is no setting of theirs
    assert [job.start_s for job in asked] == [0.0, 1.0, 2.0, 0.0]
    assert captions(set_) == [f"new, {SAID}"] * 4
    assert not memory.exists()


def test_what_ran_into_the_time_limit_is_tried_again(set_, model, monkeypatch):
    def in_workers(function, jobs, number, timeout_s, **_):
        yield from ((job, None, Failure(Ending.TIMED_OUT, "late")) if job.path.suffix == ".mp4"
                    else (job, function(job), None) for job in jobs)

    def killed(self, jobs, seen):
        raise KeyboardInterrupt

    with monkeypatch.context() as slow:
        slow.setattr(journal, "in_workers", in_workers)
        slow.setattr(captioner.Captioner, "ask", killed)
        assert call(set_, "--model", model) == 130
    assert call(set_, "--model", model) == 0
    assert captions(set_) == [SAID, "by hand", SAID, SAID]


@pytest.mark.parametrize("other", [["--frames", "2"], ["--max-pixels", "999"], ["--prompt", "what?"],
                                   ["--max-tokens", "20"], ["--dtype", "float32"], ["--kind", "style"]])
def test_other_settings_or_another_file_ask_anew(set_, other):
    rows = caption.gather(set_, set_)
    told = [caption._settings(caption._parser().parse_args([str(set_), *more])) for more in ([], other)]
    first, second = ([caption._key(row, settings) for row in rows] for settings in told)
    assert not {*first} & {*second}
    assert len({*first}) == len(rows)
    (set_.parent / "film.mp4").write_bytes(b"another")
    assert [a == b for a, b in zip(first, [caption._key(row, told[0]) for row in rows], strict=True)] == [
        False, False, False, True]


def test_the_next_batch_is_decoded_while_one_is_captioned(set_, model, monkeypatch):
    ask, last_seen = captioner.Captioner.ask, threading.Event()
    see_ = captioner.see
    monkeypatch.setattr(caption, "see", lambda job: (job.path.suffix == ".png" and last_seen.set()) or see_(job))
    waited = []

    def ask_first(self, jobs, seen):
        waited.append(last_seen.wait(5))
        return ask(self, jobs, seen)

    monkeypatch.setattr(captioner.Captioner, "ask", ask_first)
    call(set_, "--model", model)
    assert waited[0]


@pytest.mark.parametrize(("said", "text"), [
    ('"A red ball rolls."', "A red ball rolls."), ("\u201cA ball.\u201d", "A ball."), ("'A ball.'", "A ball."),
    ('"Stop" is on the "sign"', '"Stop" is on the "sign"'), ("A ball.\n\nIt\nrolls. ", "A ball. It rolls."),
    ("This video shows a ball.", "A ball."), ("The short video clip depicts a ball.", "A ball."),
    ("In this video, a ball rolls.", "A ball rolls."), ("In the image we can see a ball.", "A ball."),
    ("The video begins with a ball.", "A ball."), ('Caption: "The video features a ball."', "A ball."),
    ("Sure! Here's a caption for the video: A ball.", "A ball."), ("**Caption:** A ball.", "A ball."),
    ("<think>It is round.\nA ball?</think>\nA ball.", "A ball."), ("It is round.</think> A ball.", "A ball."),
    ("<think>It is round, so", ""), ("# A ball\n- rolls", "A ball rolls"),
    ("The video game shows on a screen.", "The video game shows on a screen."),
    ("In the image of a mirror, a man.", "In the image of a mirror, a man."),
    ("The picture frame hangs.", "The picture frame hangs."), ("Sure-footed goats climb.", "Sure-footed goats climb."),
    ("A man said: go.", "A man said: go."), ("Certainly not a cat.", "Certainly not a cat.")])
def test_an_answer_is_cleaned_and_nothing_else_is_taken(said, text):
    assert captioner.clean(said) == text


@pytest.mark.parametrize(("said", "is_finished", "text", "fault"), [
    ("A ball rolls.", True, "A ball rolls.", ""), ("A ball rolls. It sto", False, "A ball rolls.", ""),
    ("A ball of 1.5 m rolls and", False, "", "no end of a sentence in 9 tokens: allow more with --max-tokens"),
    ("", True, "", "says nothing"), (' "..." ', True, "", "says nothing"), ("<think>so", True, "", "says nothing"),
    ("A dog. " + "the dog runs and " * 9, False, "", "repeats itself: ..."),
    ("A man walks. A dog runs. A man walks. It rains. A man walks.", True, "", "repeats itself: ...'A man walks."),
    ("A man walks. A dog walks. A man walks again.", True, "A man walks. A dog walks. A man walks again.", ""),
    ("I'm sorry, but I can't describe it.", True, "", "refuses: \"I'm sorry"),
    ("I cannot see it.", True, "", "refuses"), ("Certainly! I am very sorry.", True, "", "refuses"),
    ("A sign says: I cannot wait.", True, "A sign says: I cannot wait.", "")])
def test_an_answer_that_is_no_caption_is_a_fault(said, is_finished, text, fault):
    told = captioner.judge(captioner.Answer(said, is_finished), 9)
    assert told[0] == text
    assert fault in told[1]
    assert bool(told[1]) == bool(fault)


@pytest.mark.parametrize(("sentence", "fault"), [
    ((" ball",) * 2, "repeats itself: ...'Ball ball ball "), (("<|im_end|>",), "says nothing"),
    (("<think>", " ball", "<|im_end|>"), "says nothing"), ((" a red", " ball", " away"), "no end of a sentence")])
def test_a_model_that_says_no_caption_is_a_fault_of_the_clip(set_, here, capsys, sentence, fault):
    before = captions(set_)
    limit = "3" if sentence[-1] == " away" else "12"
    assert call(set_, "--model", write_model(set_.parent / "odd", sentence), "--max-tokens", limit, "--overwrite",
                "--trigger", "wrds") == 2, "nothing was captioned"
    out = "".join(capsys.readouterr())
    assert "4 rows = 0 captioned + 0 kept + 4 faulty" in out
    assert out.count("fault: ") == 4
    assert "fault: still.png: the model " in out
    assert fault in out
    assert captions(set_) == before


@pytest.mark.parametrize(("text", "trigger", "out"), [
    ("A ball.", "wrds", "wrds: A ball."), ("A wrds ball.", "wrds", "A wrds ball."),
    ("Awrdsome.", "wrds", "wrds: Awrdsome."),
    ("A ball.", "", "A ball."), ("A {trigger} ball.", "wrds", "wrds: A {trigger} ball.")])
def test_the_trigger_stands_in_a_caption_once(text, trigger, out):
    once = captioner.with_trigger(text, trigger, "{trigger}: {caption}")
    assert once == out
    assert captioner.with_trigger(once, trigger, "{trigger}: {caption}") == once


@pytest.mark.parametrize(("name", "words"), [
    ("red_car-driving.mp4", "red car driving"), ("0012 a_Dog runs (3).mov", "a Dog runs"), ("cat01.png", "cat"),
    ("goldenGate_1080p_24fps_v2.mp4", "golden Gate"), ("night city.mp4@12.345.mp4", "night city"),
    ("00017.mp4", ""), ("r2d2.png", "r2d2"), ("1920x1080_sea.mkv", "sea"), ("caf\u00e9_3.mp4", "caf\u00e9")])
def test_a_name_becomes_words(name, words):
    assert caption.readable(name) == words


def test_captions_come_from_names_and_columns(set_, capsys):
    assert call(set_, "--from", "names", "--trigger", "wrds") == 0
    assert captions(set_) == ["wrds, film", "by hand", "wrds, film", "wrds, still"]
    rows = read_rows(set_)
    rows[0] |= {"tags": ["one", " ", "two\n2"], "caption": ""}
    assert call(write_rows(set_, rows), "--from", "tags", "--overwrite", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "film.mp4@0.000#1: one | two 2" in out
    assert "4 rows = 1 captioned + 0 kept + 3 faulty" in out
    assert read_rows(set_) == rows
    assert call(set_, "--from", "tags", "--trigger", "x") == 0
    assert [read_rows(set_)[0][c] for c in ("caption", "captions", "tags")] == ["x, one", ["x, two 2"], rows[0]["tags"]]
    assert call(set_, "--from", "note2") == 2
    assert "--from note2: there is no such column" in (err := capsys.readouterr().err)
    assert "model, sidecars, names, caption, captions, end_s" in err


@pytest.fixture
def folder(tmp_path):
    """a.png with two sidecars, a.b.png with one, c.png with none, and partners."""
    for name in ("a.png", "a.b.png", "c.png", "control/a.png", "mask/c.png", "deeper/d.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / "set" / name)
    for name, text in (("a.txt", "A one\n"), ("a.2.txt", "A two"), ("a.b.txt", "\ufeffB"), ("notes.txt", "none")):
        (tmp_path / "set" / name).write_text(text)
    return tmp_path / "set"


def test_a_folder_becomes_a_manifest_beside_it(folder, tmp_path, model, capsys):
    before, out = files_of(folder), tmp_path / "out" / "m.jsonl"
    assert call(folder, "--model", model, "--out", out) == 0
    assert "3 rows = 1 captioned + 2 kept + 0 faulty" in capsys.readouterr().out
    rows = [{"video": "../set/a.b.png", "caption": "B"},
            {"video": "../set/a.png", "caption": "A one", "captions": ["A two"], "control": "../set/control/a.png"},
            {"video": "../set/c.png", "caption": SAID, "mask": "../set/mask/c.png"}]
    assert read_rows(out) == rows
    assert files_of(folder) == before
    mended = [{"video": "../elsewhere.png", "caption": "foreign"}, rows[2] | {"caption": "by hand", "motion": 1}]
    write_rows(out, mended)
    assert call(folder, "--model", model, "--out", out) == 0
    assert read_rows(out) == [*rows[:2], mended[1], mended[0]]
    assert call(folder) == 2
    assert "give --out " in capsys.readouterr().err


def test_captions_come_from_sidecars(folder, tmp_path, capsys):
    path = write_rows(tmp_path / "m.jsonl", [{"video": f"set/{name}", "caption": ""} for name in (
        "a.png", "a.b.png", "c.png", "gone/x.png")])
    assert call(path, "--from", "sidecars") == 0
    assert [(row["caption"], row.get("captions")) for row in read_rows(path)] == [
        ("A one", ["A two"]), ("B", None), ("", None), ("", None)]
    assert "fault: set/c.png: no c.txt with it" in capsys.readouterr().out


def test_a_csv_is_read_and_written_as_lines_of_json(set_, capsys):
    table = set_.with_name("m.csv")
    table.write_text("video,caption,motion\nstill.png,,0.5\nfilm.mp4,there,\n")
    assert call(table, "--from", "names") == 2
    out = set_.parent / "deep" / "m.jsonl"
    assert call(table, "--from", "names", "--out", out) == 0
    assert read_rows(out) == [{"video": "../still.png", "caption": "still", "motion": 0.5},
                              {"video": "../film.mp4", "caption": "there", "motion": None}]


def test_faulty_lines_are_named_together_and_nothing_is_written(set_, capsys):
    set_.write_text('{"video": "still.png", "caption": ""}\nnonsense\n[1]\n{"caption": "x"}\n')
    before = set_.read_bytes()
    assert call(set_, "--from", "names") == 2
    err = capsys.readouterr().err
    assert all(f"line {number}: " in err for number in (2, 3, 4))
    assert set_.read_bytes() == before


def test_a_manifest_that_somebody_changes_meanwhile_is_left_alone(set_, model, asked, monkeypatch, capsys):
    ask = captioner.Captioner.ask
    monkeypatch.setattr(captioner.Captioner, "ask", lambda *given: write_rows(set_, mended) and ask(*given))
    mended = [row | {"caption": "mended by hand"} if row["video"] == "still.png" else row for row in read_rows(set_)]
    assert call(set_, "--model", model) == 2
    assert read_rows(set_) == mended
    assert "was changed while captions were made" in capsys.readouterr().err
    assert call(set_, "--model", model) == 0
    assert captions(set_) == [SAID, "by hand", SAID, "mended by hand"]
    assert len(asked) == 2


def test_a_model_that_is_none_says_what_to_do(set_, model, tmp_path, monkeypatch, capsys):
    def told(*arguments):
        assert call(set_, *arguments) == 2
        return capsys.readouterr().err

    (tmp_path / "bare").mkdir()
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "llama"}')
    holed = write_model(tmp_path / "holed")
    weights = caption_weights(holed)
    weights.pop("lm_head.weight")
    save_weights(holed, weights)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "does not exist" in told("--model", "./nowhere")
    assert "bare cannot be loaded" in told("--model", tmp_path / "bare")
    assert "LlamaConfig is of no model for images and text" in told("--model", text)
    assert "1 weights are missing, such as lm_head.weight" in told("--model", holed)
    assert "--dtype 4bit needs the package bitsandbytes" in told("--model", model, "--dtype", "4bit")
    assert "--kind character names the {trigger}, and there is no --trigger" in told("--kind", "character")
    assert "has no {caption} in it" in told("--form", "{trigger}")
    assert captions(set_) == ["", "by hand", "", ""]


def caption_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save_weights(folder, weights):
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_every_kind_leaves_out_what_the_trigger_is_for(set_):
    def words(kind, name):
        settings = caption._settings(caption._parser().parse_args(["m.jsonl", "--kind", kind, "--trigger", "wrds"]))
        return captioner.worded(settings, captioner.Job(Path(name), 0, 1, 1, 1))

    said = {kind: words(kind, "film.mp4").partition("Leave out") for kind in caption.KINDS}
    assert "style" in said["style"][2]
    assert "is called wrds" in said["character"][0]
    assert "hair" in said["character"][2]
    assert "movement" in said["motion"][2]
    assert all("{" not in "".join(text) for text in said.values())
    assert "of this picture" in words("general", "still.png")
    assert "of this video" in words("general", "film.mp4")


def see_but_never_the_first(job):
    """What is seen, but for the film's first shot, whose reading never ends (it runs in a worker)."""
    if job.path.suffix == ".mp4" and not job.start_s:
        time.sleep(600)
    return captioner.see(job)


@pytest.mark.slow
def test_a_file_that_takes_too_long_stops_no_other(set_, model_folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(caption, "see", see_but_never_the_first)
        assert call(set_, "--model", model_folder, "--timeout-s", "8") == 0
    out = capsys.readouterr().out
    assert "4 rows = 2 captioned + 1 kept + 1 faulty" in out
    assert "fault: film.mp4@0.000#1: " in out
    assert "film.mp4: not finished after 8 s; allow more with --timeout-s" in out
    assert captions(set_) == ["", "by hand", SAID, SAID]
    assert call(set_, "--model", model_folder) == 0
    assert captions(set_) == [SAID, "by hand", SAID, SAID]


def test_a_span_that_is_named_twice_is_asked_once(set_, model, asked):
    row = read_rows(set_)[0]
    call(write_rows(set_, [row, row | {"id": "again"}, {"video": "film.mp4", "captions": ["a"]}]), "--model", model)
    assert [r.get("caption") for r in read_rows(set_)] == [SAID, SAID, None]
    assert [len(inputs["input_ids"]) for inputs in asked] == [1]


def test_thoughts_that_the_template_begins_are_no_caption(set_, model, capsys):
    folder = set_.parent / "thinking"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = TEMPLATE.replace("assistant\n", "assistant\n{% if enable_thinking != false %}<think>\n{% endif %}")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    call(set_, "--model", folder)
    assert captions(set_)[0] == SAID  # asked not to think
    template = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    call(set_, "--model", folder, "--overwrite")
    assert capsys.readouterr().err.count("the model says nothing") == 4
