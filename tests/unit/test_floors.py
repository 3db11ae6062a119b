"""The floors and doors of the house: imports go down only, each library has one door."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "wantrain"
TESTS = PACKAGE.parent / "tests"
FLOORS = {
    "terms": 0, "files": 0.5, "lock": 0.5, "logs": 0.5, "outside": 0.5, "targets": 0.5, "density": 0.5,
    "flow": 1, "lora": 1, "style": 1, "judging": 1, "verdict": 1, "options": 1, "jobs": 1, "results": 1, "asking": 1,
    "serving": 1, "tensors": 1, "journal": 1.5, "pictures": 1.5, "models": 2, "data": 2, "costs": 2.5,
    "config": 3, "engine": 3, "metrics": 3, "objective": 3,
    "validation": 4, "pages": 4, "recipe": 5, "stages": 6, "runner": 6.5, "tuner": 6.5, "cli": 7, "__main__": 8,
}
DOORS = {
    "hydra": {"config"}, "omegaconf": {"config"}, "diffusers": {"models"}, "transformers": {"models"},
    "decord": {"data.decode"}, "datasets": {"data.manifest"}, "peft": {"lora"}, "accelerate": {"engine"},
    "deepspeed": {"engine"}, "wandb": {"metrics"}, "tensorboard": {"metrics"}, "jinja2": {"pages"},
    "huggingface_hub": {"models.downloads"}, "httpx2": {"outside", "models.downloads"},
    "modelscope": {"models.downloads"}, "bitsandbytes": {"engine", "models.four_bits"}, "prodigyopt": {"engine"},
    "schedulefree": {"engine"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imported(path):
    """Absolute names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module.split(".")[0] in ("wantrain", "tests"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def climbing(own, other):
    """Whether module `own` may not import module `other` (both without the leading wantrain.)."""
    room, other_room = own.split(".")[0], other.split(".")[0]
    if other_room not in FLOORS or not own:
        return False
    if room == other_room:
        return room == "stages" and own != "stages" and (PACKAGE / "stages" / f"{other.split('.')[-1]}.py").exists()
    return FLOORS[other_room] >= FLOORS[room]


def violations():
    for path in sorted(PACKAGE.rglob("*.py")):
        own = module_name(path)
        for name in imported(path):
            library = name.split(".")[0]
            if library == "wantrain" and climbing(own, name.removeprefix("wantrain").lstrip(".")):
                yield f"{own} imports {name}"
            if library in DOORS and not any(own == door or own.startswith(door + ".") for door in DOORS[library]):
                yield f"{own} imports {library}, whose door is {DOORS[library]}"
            if library in ("data_tools", "tests", "tools"):
                yield f"{own} imports {library}"


def test_every_room_has_a_floor():
    assert {module_name(p).split(".")[0] for p in PACKAGE.rglob("*.py")} - {""} == set(FLOORS)


def test_imports_go_down_and_libraries_have_one_door():
    assert list(violations()) == []


def test_the_rule_itself_sees_a_climb():
    assert climbing("flow", "models.base")
    assert climbing("data.cache", "models.base")
    assert climbing("config", "engine")
    assert climbing("recipe.clips", "stages.train")
    assert climbing("stages.train", "stages.export")
    assert not climbing("stages.train", "stages")
    assert not climbing("stages.train", "models.base")


def test_data_tools_stay_below_the_engine():
    for path in (PACKAGE.parent / "data_tools").rglob("*.py"):
        rooms = {n.split(".")[1] for n in imported(path) if n.startswith("wantrain.")}
        assert {r for r in rooms if FLOORS[r] > 2} == set(), path


def test_no_test_is_imported():
    """What several tests need stands in conftest.py or in a module beside them, which is no test itself."""
    found = {(str(path), name) for path in TESTS.rglob("*.py") for name in imported(path)
             if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))}
    assert found == set()
