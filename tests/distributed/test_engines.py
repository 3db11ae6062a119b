"""docs/engines.md says what is found here: each engine resumes to the bit, and all train alike."""

from __future__ import annotations

import os

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.distributed import engine_table
from tests.distributed.engine_table import COMMAND, PACKAGES, PAGE, ROWS, Bench
from tests.distributed.forked import ENGINES
from tests.runs import LAUNCH
from wantrain.engine.optimizers import OPTIMIZERS

FILES = {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "ZeRO-3 offload": "zero3_offload",
         "FSDP2": "fsdp2"}
REPEATING = ("ZeRO-1", "ZeRO-3 offload")
"""Engines with which wantrain does nothing else than with ZeRO-2 and ZeRO-3; what they train is in the tier long. So is
what other engines than DDP train with other optimizers than AdamW.
"""


def is_long(row):
    return not row.refused and (row.engine in REPEATING or (row.engine != "DDP" and row.optimizer != "adamw"))


@pytest.fixture(scope="module")
def bench(forker, tmp_path_factory):
    return Bench(forker, tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
@pytest.mark.parametrize("row", [
    pytest.param(row, marks=pytest.mark.long if is_long(row) else ()) for row in ROWS], ids=str)
def test_the_page_says_what_is_found(bench, row):
    if not row.refused and row.optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[row.optimizer])
    cells = engine_table.find(bench, row)
    assert not [cell for cell in cells if "NOT" in cell], cells
    assert engine_table.line(row, cells) in PAGE.read_text().splitlines(), f"{COMMAND} writes it anew"


@pytest.mark.slow
@pytest.mark.long
def test_a_run_may_change_its_engine_at_every_step(bench):
    found = engine_table.travelled(bench)
    assert "NOT" not in found
    assert f"against one process: {found}.\n" in PAGE.read_text()


def test_the_page_has_every_engine_with_every_optimizer_and_is_otherwise_up_to_date():
    assert FILES.keys() == ENGINES.keys()
    assert [(row.engine, row.optimizer) for row in ROWS] == [(e, o) for e in ENGINES for o in OPTIMIZERS]
    text = PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith(tuple(f"| {engine} |" for engine in ENGINES))]
    travel = text.partition("against one process: ")[2].partition(".\n")[0]
    assert text == engine_table.page(lines, travel), f"{COMMAND} writes it anew"
    assert len(lines) == len(ROWS)
    assert "NOT" not in "".join(lines) + travel


@pytest.mark.parametrize(("engine", "file"), FILES.items())
def test_an_engine_is_chosen_here_as_its_launch_file_chooses_it(engine, file, monkeypatch):
    for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(key)
    arguments = launch.launch_command_parser().parse_args(
        ["--config_file", str(LAUNCH / f"{file}.yaml"), "--main_process_port", "0", "-m", "wantrain"])
    arguments, *_ = launch._validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    set_by_launch = (prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed
                     else prepare_multi_gpu_env(arguments))
    assert ENGINES[engine].items() <= set_by_launch.items()
    assert arguments.use_deepspeed == ("ACCELERATE_USE_DEEPSPEED" in ENGINES[engine])
    assert arguments.use_fsdp == ("ACCELERATE_USE_FSDP" in ENGINES[engine])
