"""What ships: the embedded base, the demo sets, the wheel, and a README whose commands run."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests import tiny_tasks
from tests.conftest import arguments_for
from tests.tiny_captioner import write_model
from wantrain import cli, config
from wantrain.data import manifest
from wantrain.models import base
from wantrain.models.variants import VARIANTS

ROOT = Path(__file__).parents[2]


def size_mb(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def test_the_embedded_base_is_small_enough_and_loads_strictly():
    assert size_mb(base.EMBEDDED) <= 25
    tiny = base.find(VARIANTS["tiny_wan"], "embedded", {})
    assert "tiny_wan: from the tensors" in tiny.detected()


def test_the_demo_sets_are_small_enough_and_whole():
    assert size_mb(config.asset("demo")) <= 8
    for name, number, least in (("anime", 40, 8), ("architecture", 40, 8), ("footage", 18, 4)):
        folder = config.asset(f"demo/{name}")
        trigger = config.load([f"recipe=demo_{name}"]).data.trigger
        styled, heldout = (manifest.read(manifest.ClipSource("s", str(p))) for p in (folder, folder / "heldout"))
        assert len(styled) == number
        assert len(heldout) >= least
        assert all(clip.caption.startswith(f"{trigger}, ") for clip in styled + heldout)
        assert not {c.caption for c in styled} & {c.caption for c in heldout} or name != "footage"
    for name in ("anime", "architecture"):
        plain = manifest.read(manifest.ClipSource("r", str(config.asset(f"demo/{name}/regularisation"))))
        assert len(plain) >= 8
        assert not any("style" in clip.caption for clip in plain)


PAGES = ("README.md", "launch/README.md", "docs/verbs.md", "docs/data.md")


def readme_commands(first_word):
    """Lines of the bash blocks of the README, and of the pages that it stands for, that start with a word; continuation
    lines joined, comments off.
    """
    text = "".join((ROOT / page).read_text() for page in PAGES)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip() for line in blocks.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith(first_word)]


def test_the_readme_tells_maintainers_of_every_tier_and_every_page_that_is_made():
    told = (ROOT / "docs" / "maintaining.md").read_text()
    assert "docs/maintaining.md" in (ROOT / "README.md").read_text()
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {line.partition(":")[0] for line in options["markers"]} <= set(re.findall(r"\| `(\w+)`", told))
    made = {command for page in (ROOT / "docs").glob("*.md") if page.name not in ("LOG.md", "maintaining.md")
            for command in re.findall(r"`(python -m tests\.[\w.]+)`", page.read_text())}
    assert len(made) == 3
    assert made <= set(re.findall(r"`(python -m [\w.]+)", told))


def test_the_readme_speaks_of_every_verb_and_of_make():
    verbs = {shlex.split(line)[1] for line in readme_commands("wantrain ")}
    assert verbs == {*cli.VERBS, *cli.OPTION_VERBS, *cli.TOOLS}
    assert [line.split()[1] for line in readme_commands("make ")][:2] == ["demo", "test"]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in readme_commands("make ")} <= targets


NEEDS_A_LORA = ("train", "export", "sample", "evaluate", "inspect", "convert", "merge", "extract")
"""Verbs whose commands build on each other: they run in one test, in this order."""
OF_THE_TUTORIAL = ("prepare", "new", "run")
"""Verbs whose commands are those of docs/first-lora.md, which run in tests/journey/test_first_lora.py."""
OF_A_RUN = ("ask", "view", "share")
"""Verbs that need a run: tests/unit/test_asking.py, test_run_page.py and test_share.py run them."""
SEARCH = "tune"
"""Its command runs in tests/journey/test_tune.py."""
COMMANDS = [line for line in readme_commands("wantrain ")
            if shlex.split(line)[1] not in (*OF_THE_TUTORIAL, *OF_A_RUN, SEARCH)]
CHAIN = sorted((line for line in COMMANDS if shlex.split(line)[1] in NEEDS_A_LORA),
               key=lambda line: NEEDS_A_LORA.index(shlex.split(line)[1]))
ALONE = [line for line in COMMANDS if line not in CHAIN]


@pytest.fixture
def run_command(clips, cache_dir, cached, tmp_path, monkeypatch):
    """Run a command of the README with the tiny base (or the task's tiny twin), small clips and few steps in place of
    what the reader has.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    shutil.copy(clips / "plain" / "clip_0.mp4", tmp_path / "my" / "film.mp4")
    small = [*arguments_for(clips, cache_dir, tmp_path / "run")[1:], "model=tiny_wan"]
    exported = str(tmp_path / "run" / "export" / "anime_1b3.safetensors")

    def run(line):
        verb, *own = shlex.split(line.replace("runs/anime_1b3/export/anime_1b3.safetensors", exported)
                                 .replace("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", str(base.EMBEDDED))
                                 .replace("prune cache", f"prune {cache_dir}"))[1:]
        if "--help" in own or verb in (*cli.FILE_VERBS, *cli.MACHINE_VERBS):
            return cli.main([verb, *own])
        recipe = [a for a in own if not a.startswith(("data.", "model"))]
        return cli.main([verb, *recipe, *with_twin(small, recipe[0], tmp_path)])

    return run


@pytest.mark.parametrize("line", ALONE)
def test_a_command_of_the_readme_runs_on_the_tiny_base(run_command, line):
    assert run_command(line) == 0


def test_the_readmes_commands_from_training_to_the_files_run_on_the_tiny_base(run_command):
    assert len(CHAIN) + len(ALONE) == len(COMMANDS) == 20
    for line in CHAIN:
        assert run_command(line) == 0, line


def with_twin(small, recipe, folder):
    """The overrides for a recipe whose task the embedded base does not have."""
    twin = {"recipe=anime_a14b": "tiny_wan_a14b", "recipe=motion_i2v_a14b": "tiny_wan_i2v_a14b"}.get(recipe)
    if twin is None:
        return small
    kept = [a for a in small if "regularisation" not in a or "anime" in recipe]
    path = tiny_tasks.write_checkpoint(folder / twin, twin)
    return [*(a.replace("sources.style", "sources.motion") if "motion" in recipe else a for a in kept[:-1]),
            f"model.variant={twin}", f"model.path={path}", "data.allow_drops=true"]


def test_the_readme_is_short_and_its_first_lora_is_that_of_the_tutorial():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    tutorial = (ROOT / "docs" / "first-lora.md").read_text().splitlines()
    own = [line for line in readme_commands("wantrain ") if shlex.split(line)[1] in OF_THE_TUTORIAL]
    assert len(own) >= len(OF_THE_TUTORIAL)
    assert {*own} <= {*tutorial}


@pytest.mark.slow
def test_the_data_tools_of_the_readme_run(tmp_path, monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "films").symlink_to(config.asset("demo/footage/heldout"))
    write_model(tmp_path / "model")
    stand_ins = {"wantrain-caption": ["--model", "model", "--dtype", "float32", "--max-tokens", "12", "--frames", "2"]}
    called = set()
    for line in readme_commands("wantrain-"):
        if "--detector" in line:  # a network: tests/unit/test_transnet.py
            continue
        name, *own = shlex.split(line.replace("--share 0.1", "--num 1"))
        module, _, function = scripts[name].partition(":")
        called.add(name)
        if name == "wantrain-review":  # it serves until it is stopped: tests/browser
            assert Path(own[-1]).exists()
            continue
        assert getattr(importlib.import_module(module), function)([*own, *stand_ins.get(name, [])]) == 0, line
    assert called == {*scripts} - {"wantrain"}
    assert all("mystyl style, " in row for row in Path("my_train.jsonl").read_text().splitlines())
    assert Path("my_train.jsonl").read_text().count("\n") + Path("my_heldout.jsonl").read_text().count("\n") >= 4


@pytest.mark.slow
@pytest.mark.long
def test_the_costs_that_recipes_tell_are_those_of_the_plan(capsys):
    """As the plan rounds them today, within a tenth."""
    told = {path.stem: re.findall(r"(rtx4090|h100) (\d+) GiB, (\d+) s a step, (\d+) hours", path.read_text())
            for path in sorted((ROOT / "configs" / "recipe").glob("*.yaml")) if not path.stem.startswith("demo")}
    assert all(len(costs) == 2 for costs in told.values())
    for name, costs in told.items():
        for card, *numbers in costs:
            assert cli.main(["plan", f"recipe={name}", "--gpu", card]) == 0
            found = re.findall(r"^(?:as the recipe says|fastest that fits) +([\d.]+) GiB, fits; ([\d.]+) s a step, "
                               r"([\d.]+) hours", capsys.readouterr().out, re.MULTILINE)
            assert [float(number) for number in numbers] == pytest.approx(
                [float(number) for number in found[0]], rel=0.1, abs=0.5), (name, card)


def test_the_launch_commands_name_files_and_recipes_that_exist():
    commands = readme_commands("accelerate launch")
    assert len(commands) >= 2
    for line in commands:
        words = shlex.split(line)
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        assert words[words.index("-m") + 1] == "wantrain"
        config.load(words[words.index("-m") + 3:])


def test_links_in_the_documents_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


TEXTS = [path for pattern in ("*.py", "*.yaml", "*.md") for path in sorted(ROOT.rglob(pattern))
         if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
CITED = re.compile(r'\b((?:docs|launch)/[\w-]+\.md)((?:,? (?:and )?"[^"]+")*)')
"""A page and the titles of its sections, such as "VAE" and "Encoders"."""
ELSEWHERE = re.compile(r"(?<![\w/])(?:\.\./)*(?:shared|facts)/(?!cases/)|DESIGN\.md|/wor[k]/")
"""Places beside the repository. Tests may use the cases that came with issues, where they are at hand."""


def sections_of(page):
    return set(re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE))


def test_every_page_and_section_that_is_cited_exists_and_no_fact_is_there_for_nothing():
    cited = set()
    for path in TEXTS:
        text = re.sub(r"\n\s*(?:# )?", " ", path.read_text())
        for page, titles in CITED.findall(text):
            assert (ROOT / page).is_file(), (path, page)
            wanted = set(re.findall(r'"([^"]+)"', titles))
            assert wanted <= sections_of(ROOT / page), (path, page, wanted)
            cited |= {title for title in wanted if page == "docs/facts.md" and path.suffix == ".py"}
    titles = set(re.findall(r"^##+ (.+)$", (ROOT / "docs/facts.md").read_text(), re.MULTILINE))
    assert titles - cited == {"Versions"}


def test_nothing_is_cited_that_lies_outside_of_the_repository():
    lines = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in TEXTS
             for number, line in enumerate(path.read_text().splitlines(), 1) if ELSEWHERE.search(line)]
    assert not lines, "\n".join(lines)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configs_and_assets(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)],
                   check=True)
    wheel, = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shown = subprocess.run([sys.executable, "-m", "wantrain", "check", "recipe=demo_anime"], cwd=tmp_path, text=True,
                           env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, check=True)
    assert f"{tmp_path}/site/wantrain/assets/tiny_wan/transformer" in shown.stdout
