"""`wantrain ask`: a file that the loop meets at its next step."""

from __future__ import annotations

import pytest

from tests.runs import lines
from wantrain import asking, cli
from wantrain.engine import saved
from wantrain.stages import train


def test_what_is_asked_reaches_the_trainings_of_a_run_that_are_at_work(holding, tmp_path, capsys):
    holding(tmp_path / "high")
    assert cli.main(["ask", str(tmp_path), "save"]) == 0
    assert str(tmp_path / "high" / "checkpoints") in capsys.readouterr().out
    assert asking.asked(tmp_path / "high") == {"save"}
    assert asking.asked(tmp_path) == asking.asked(tmp_path / "low") == set()
    asking.answer(tmp_path / "high", {"save"})
    assert asking.asked(tmp_path / "high") == set()


def test_a_run_that_does_not_train_hears_nothing_and_says_what_to_do(tmp_path, capsys):
    assert cli.main(["ask", str(tmp_path), "stop"]) == 2
    assert "nothing trains in" in capsys.readouterr().err
    assert cli.main(["ask", str(tmp_path), "smaple"]) == 2
    assert "sample, save, stop" in capsys.readouterr().err
    assert cli.main(["ask", "no_such_run", "stop"]) == 2
    assert "there is no run no_such_run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def asking_at(monkeypatch):
    """asking_at(step, what): ask while that step is at work."""
    step_as_it_is = train.train_step

    def call(at, what):
        def train_step(training, step, micro_batches):
            if step + 1 == at:
                (training.recipe.run_dir / asking.FOLDER).mkdir()
                (training.recipe.run_dir / asking.FOLDER / what).touch()
            return step_as_it_is(training, step, micro_batches)

        monkeypatch.setattr(train, "train_step", train_step)

    return call


def test_save_writes_a_checkpoint_of_the_step_at_hand_and_the_training_goes_on(asking_at, trained):
    asking_at(2, "save")
    run = trained("run")
    assert [path.name for path in saved.steps_on_disk(run / "checkpoints")] == ["step_000002", "step_000004"]
    assert asking.asked(run) == set()


def test_stop_saves_and_ends_and_a_request_that_came_too_late_is_forgotten(asking_at, wantrain, tmp_path):
    asking_at(3, "stop")
    assert wantrain("train") == 130
    run = tmp_path / "run"
    assert [path.name for path in saved.steps_on_disk(run / "checkpoints")] == ["step_000003"]
    (run / asking.FOLDER / "stop").touch()
    assert wantrain("train") == 0
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
