"""What training must keep true, whatever changes: each on the embedded base through the real verbs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.conftest import arguments_for, opened
from tests.runs import lines, losses, same_bits, state
from wantrain import cli, flow, lora
from wantrain import config as schema
from wantrain.config import load
from wantrain.data.batches import Order
from wantrain.density import Density
from wantrain.engine import saved
from wantrain.engine.stopping import Stopper
from wantrain.files import digest_folder
from wantrain.models import base
from wantrain.recipe.samples import Cached
from wantrain.recipe.training import prepare
from wantrain.stages import train


@pytest.fixture(scope="module")
def plain(clips, cache_dir, cached, tmp_path_factory):
    """The run folder of the small recipe as it is: four steps. Not to be changed."""
    run = tmp_path_factory.mktemp("plain") / "run"
    assert cli.main(["train", *arguments_for(clips, cache_dir, run)]) == 0
    return run


@pytest.fixture
def copied(plain, tmp_path):
    """One that may be changed."""
    return shutil.copytree(plain, tmp_path / "run")


def test_the_base_is_bit_identical_after_training_and_the_adapter_is_not(wantrain, arguments, cached):
    training = prepare(*opened([*arguments, "train.num_steps=3"]))
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    with Stopper() as stopper:
        train.train(training, Cached(training.clips), stopper)
    training.writer.finish()
    assert training.progress.step == 3
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_streaming_gives_the_loss_and_the_weights_that_the_cache_gives(plain, trained):
    streamed = trained("streamed", "data.mode=stream")
    assert losses(plain) == losses(streamed)
    assert same_bits(state(plain)[1], state(streamed)[1])


def test_accumulation_equals_batch(plain, trained):
    parts = trained("parts", "train.micro_batch_size=1")
    torch.testing.assert_close(torch.tensor(losses(plain)), torch.tensor(losses(parts)), rtol=1e-5, atol=0)
    a, b = state(plain)[1], state(parts)[1]
    for name, tensor in a.items():
        if name.endswith("|exp_avg"):
            torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))


def test_ten_steps_are_five_and_resume_and_five_bitwise(trained):
    whole = trained("whole", "train.num_steps=10")
    trained("parts", "train.num_steps=5")
    parts = trained("parts", "train.num_steps=10")
    assert losses(whole) == losses(parts)
    assert [line["step"] for line in lines(parts)] == list(range(1, 11))
    assert state(parts)[0] == 10
    assert same_bits(state(whole)[1], state(parts)[1])


def test_resume_refuses_another_config_and_says_which_key(copied, wantrain, capsys):
    assert wantrain("train", f"run.dir={copied}", "optim.lr=0.5", "train.num_steps=6") == 2
    assert "optim.lr: 0.002 -> 0.5" in capsys.readouterr().err
    assert wantrain("train", f"run.dir={copied}", "data.sources.regularisation.repeats=7") == 2
    assert "(clips and captions): " in capsys.readouterr().err
    assert wantrain("train", f"run.dir={copied}", "train.resume=never") == 2
    assert "train.resume=never" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(copied, wantrain, capsys):
    tensors = copied / "checkpoints" / "step_000004" / saved.TENSORS
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert wantrain("train", f"run.dir={copied}", "train.num_steps=6") == 2
    assert "damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def three_steps(clips, cache_dir, cached, tmp_path_factory):
    """The run folder of three steps of the same, with the checkpoints 2 and 3. Not to be changed."""
    run = tmp_path_factory.mktemp("three") / "run"
    own = ["train.num_steps=3", "train.save_every=2"]
    assert cli.main(["train", *arguments_for(clips, cache_dir, run), *own]) == 0
    return run


@pytest.fixture
def begun(three_steps, tmp_path):
    """One that may be changed, where trained("run") goes on."""
    return shutil.copytree(three_steps, tmp_path / "run")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_goes_on_to_the_same_end(plain, begun, trained, capsys,
                                                                                         damage):
    newest = begun / "checkpoints" / "step_000003"
    tensors = newest / saved.TENSORS
    data = tensors.read_bytes()
    tensors.write_bytes({"flipped": data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "cut": data[:100]}.get(damage, data))
    if damage == "gone":
        (newest / saved.STATE).unlink()
    capsys.readouterr()
    run = trained("run", "train.num_steps=4")
    told = capsys.readouterr().out
    assert f"checkpoint {newest} is {'incomplete' if damage == 'gone' else 'damaged'}" in told
    assert f"going on from {newest.with_name('step_000002')}" in told
    assert state(run)[0] == 4
    assert same_bits(state(run)[1], state(plain)[1])


def test_validation_moves_nothing(plain, trained):
    validated = trained("validated", "validation.every_steps=2")
    assert losses(plain) == losses(validated)
    assert same_bits(state(plain)[1], state(validated)[1])
    assert [line["step"] for line in lines(validated) if "validation_loss" in line] == [2, 4]


@pytest.mark.parametrize("setting", ["keep=attention", "keep=inputs", "swap=1", "offload=true", "gib=0.81"])
def test_how_memory_is_saved_changes_no_number(plain, trained, setting):
    spared = trained(setting, f"memory.{setting}")
    assert losses(plain) == losses(spared)
    assert same_bits(state(plain)[1], state(spared)[1])


def test_a_run_may_go_on_under_another_way_of_saving_memory(plain, trained):
    trained("changed", "train.num_steps=2", "memory.keep=inputs", "memory.swap=2")
    changed = trained("changed", "memory.keep=attention", "memory.offload=true")
    assert losses(plain) == losses(changed)
    assert same_bits(state(plain)[1], state(changed)[1])


def test_what_is_chosen_for_a_budget_is_said_and_kept(trained, capsys):
    run = trained("budget", "memory.gib=0.81", "memory.swap=2")
    assert "memory: base dtype, of 6 blocks" in capsys.readouterr().out
    memory = json.loads((run / "run.json").read_text())["memory"]
    assert memory["policy"]["swap"] == 2
    assert len(memory["policy"]["keep"]) == 6
    assert memory["planned_gib"] > 0
    assert memory["peak_gib"] > 0



def test_the_model_is_told_1000_sigma_and_the_noisy_latents_of_that_sigma(wantrain, arguments, cached):
    training = prepare(*opened([*arguments, "train.num_steps=2"]))
    told = []
    training.model.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True,
                                             prepend=True)
    with Stopper() as stopper:
        train.train(training, Cached(training.clips), stopper)
    training.writer.finish()
    for step, kwargs in enumerate(told):
        sigma_B = flow.draw_sigma(0, step, range(4), 4, Density("uniform", (), 3.0))
        assert kwargs["timestep"].dtype == torch.float32
        assert torch.equal(kwargs["timestep"], 1000 * sigma_B)
        assert kwargs["encoder_hidden_states"].shape == (4, 512, 128)
        clean = Cached(training.clips)
        order = Order(training.clips.planned, 4, 0)
        latents = torch.stack([clean.window(p).latents_CTHW for p in order.samples(step)])
        noise = flow.draw_noise(0, step, range(4), latents.shape[1:])
        assert torch.equal(kwargs["hidden_states"], flow.mix(latents, noise, sigma_B))


def test_the_adapter_in_training_starts_as_the_base(wantrain, arguments, cached):
    training = prepare(*opened(arguments))
    batch, = train.batch_maker(training, Cached(training.clips), 0)(0)
    with torch.no_grad():
        adapted = training.losses(batch)
        lora.set_strength(training.model, 0)
        frozen = training.losses(batch)
    assert torch.equal(adapted, frozen)


def test_the_run_folder_says_what_was_run(plain, arguments):
    header = json.loads((plain / "run.json").read_text())
    assert header["base_digest"] == digest_folder(base.EMBEDDED / "transformer")
    assert len(header["modules"]) == 60
    assert header["num_clips"] == 8
    assert "trigger: sqstyle" in (plain / "config.yaml").read_text()
    assert {"loss", "grad_norm", "lr", "step_s", "data_wait_s", "memory_gib"} <= lines(plain)[0].keys()
    assert header["config_digest"] == schema.digest(load([*arguments, f"run.dir={plain}"]))


def test_old_checkpoints_go_and_the_newest_stay(trained):
    run = trained("run", "train.num_steps=5", "train.save_every=1", "train.keep_checkpoints=2")
    assert [p.name for p in saved.steps_on_disk(run / "checkpoints")] == ["step_000004", "step_000005"]


def test_a_non_finite_loss_stops_before_the_update(trained, wantrain, tmp_path, monkeypatch, capsys):
    run = trained("run", "train.num_steps=2")
    before = state(run)
    monkeypatch.setattr(flow, "velocity", lambda latents, noise: noise * float("nan"))
    assert wantrain("train", f"run.dir={run}", "train.num_steps=4") == 2
    assert "the loss is not finite" in capsys.readouterr().err
    note = json.loads((run / "nonfinite_000003_process_0.json").read_text())
    assert note["losses"] == ["nan"] * 4
    assert len(note["clips"]) == len(note["sigmas"]) == 4
    after = state(run)
    assert after[0] == before[0]
    assert same_bits(after[1], before[1])


def test_trackers_get_the_metrics(trained, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trained("run", "tracker=wandb", "train.num_steps=2")
    assert len(list((run / "trackers").rglob("events.out.tfevents*"))) >= 1
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1
