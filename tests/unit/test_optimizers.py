"""Optimizers, learning rates and the average of the adapter: closed forms, and checkpoints from which they go on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import opened
from wantrain import engine, lora
from wantrain.config import formerly, load
from wantrain.engine import checkpoint, optimizers, snapshot, states
from wantrain.engine.ema import Ema, share_at
from wantrain.engine.optimizers import OPTIMIZERS, OptimizerKind
from wantrain.engine.saved import CheckpointStore, Progress, Record
from wantrain.models import base
from wantrain.models.lora_updates import read_adapter
from wantrain.models.variants import VARIANTS
from wantrain.recipe.heldout import open_validation
from wantrain.recipe.samples import Cached
from wantrain.recipe.training import prepare
from wantrain.tensors import read_tensors
from wantrain.terms import UserError

LR = {"adamw": 0.02, "adamw_8bit": 0.02, "prodigy": 1.0, "schedule_free": 0.05}
FACTORS = {"A": 1.0, "B": 16.0}
STEPS, MANY = 7, 60


class Tiny(torch.nn.Module):
    """B A x as a LoRA has it, B without effect at first; A is large enough for 8-bit states, B is not."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = torch.nn.Parameter(torch.randn(64, 80, generator=generator) / 8)
        self.B = torch.nn.Parameter(torch.zeros(3, 64))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return x @ self.A.T @ self.B.T * self.frozen


@dataclass
class Learner:
    """A training in small, with what the stage has."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: object
    kind: OptimizerKind
    ema: Ema | None
    lr: float

    def train(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 80, generator=generator)
            engine.set_learning_rate(self.optimizer, self.lr * (1 + step % 3) / 3)
            self.accelerator.backward(((self.model(x) - x[:, :3]) ** 2).mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(step + 1)
        return self

    def at_average(self):
        return optimizers.at_average(self.accelerator, self.model, self.optimizer, self.kind, self.ema)

    def tensors(self):
        return snapshot.gather(self.accelerator, self.model, self.optimizer, self.kind, self.ema)

    def restore(self, tensors, step):
        snapshot.restore(self.accelerator, self.model, self.optimizer, kind=self.kind, ema=self.ema,
                           tensors=tensors, updates=step)
        return self


@pytest.fixture
def learner():
    """learner("adamw", ...) -> a fresh training with that optimizer."""

    def call(name, factors=None, mean_age=None, weight_decay=0.01):
        if OPTIMIZERS[name].package:
            pytest.importorskip(OPTIMIZERS[name].package)
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        tiny = Tiny()
        own = {n: p for n, p in tiny.named_parameters() if p.requires_grad}
        groups = optimizers.groups(own, factors or dict.fromkeys(own, 1.0))
        model, optimizer = accelerator.prepare(tiny, optimizers.make(
            name, groups, lr=LR[name], betas=[0.9, 0.99], eps=1e-8, weight_decay=weight_decay))
        ema = None if mean_age is None else Ema(accelerator, model, mean_age)
        return Learner(accelerator, model, optimizer, OPTIMIZERS[name], ema, LR[name])

    return call


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [0, 1, 50])
def test_n_steps_are_k_and_resume_and_the_rest_bitwise(learner, tmp_path, name, k):
    settings = {"factors": None if name == "prodigy" else FACTORS,
                "mean_age": None if name == "schedule_free" else 0.2}
    whole = learner(name, **settings).train(range(MANY)).tensors()
    part = learner(name, **settings).train(range(k)).tensors()
    saved = checkpoint.save(CheckpointStore(tmp_path), Progress(k), part, Record({}))
    progress, tensors = checkpoint.load(saved, {})
    going_on = learner(name, **settings).restore(tensors, progress.step)
    assert same_bits(going_on.tensors(), tensors)
    assert same_bits(going_on.train(range(k, MANY)).tensors(), whole)


def test_what_a_checkpoint_holds(learner):
    def keys(name, **settings):
        return {key.rpartition("|")[2] for key in learner(name, **settings).train(range(2)).tensors()}

    assert keys("adamw") == {"value", "exp_avg", "exp_avg_sq"}
    assert keys("adamw", mean_age=0.2) == {"value", "y", "exp_avg", "exp_avg_sq"}
    assert keys("prodigy") == {"value", "exp_avg", "exp_avg_sq", "s", "p0", "k", "d", "d_max", "d_numerator"}
    assert keys("schedule_free") == {"value", "y", "z", "exp_avg_sq", "k", "weight_sum", "lr_max"}


def test_8_bit_states_are_kept_as_they_are(learner):
    tensors = learner("adamw_8bit").train(range(2)).tensors()
    assert tensors["A|state1"].dtype == torch.uint8
    assert tensors["B|state1"].dtype == torch.float32
    assert tensors["A|absmax1"].shape == (64 * 80 / 256,)


@pytest.mark.parametrize(("name", "bytes_A", "bytes_B"), [
    ("adamw", 8, 8), ("adamw_8bit", 2 + 2 * 4 / 256, 8), ("prodigy", 16, 12 + 4 / 192), ("schedule_free", 8, 8)])
def test_bytes_of_state_a_parameter_are_those_of_the_docs(learner, name, bytes_A, bytes_B):
    own = learner(name).train(range(2))
    found = {state.name: sum(t.nbytes for key, t in state.tensors.items() if not key.startswith("qmap")) /
             state.value.numel() for state in states.states(own.accelerator, own.model, own.optimizer)}
    assert found == {"A": bytes_A, "B": bytes_B}


def test_adamw_is_torchs(learner):
    """One param group, with the factor of 1, changes no bit."""
    own = learner("adamw").train(range(STEPS))
    model = Tiny()
    plain = torch.optim.AdamW([model.A, model.B], betas=(0.9, 0.99), weight_decay=0.01)
    other = Learner(own.accelerator, model, own.accelerator.prepare(plain), OPTIMIZERS["adamw"], None, LR["adamw"])
    for group in plain.param_groups:
        group["factor"] = 1.0
    assert same_bits(own.tensors(), other.train(range(STEPS)).tensors())


@pytest.mark.parametrize(("name", "mean_age"), [("schedule_free", None), ("adamw", 0.2)])
def test_what_is_saved_and_validated_is_the_average_and_nothing_is_moved_by_it(learner, name, mean_age):
    quiet, looked_at = (learner(name, FACTORS, mean_age) for _ in range(2))
    for step in range(STEPS):
        quiet.train([step])
        looked_at.train([step])
        before = looked_at.model.A.detach().clone()
        with looked_at.at_average():
            inside = looked_at.model.A.detach().clone()
        assert torch.equal(looked_at.model.A, before)
    saved = looked_at.tensors()
    assert same_bits(saved, quiet.tensors())
    assert torch.equal(inside, saved["A|value"])
    assert torch.equal(before, saved["A|y"])
    assert not torch.equal(inside, before)
    if name == "schedule_free":
        quiet.optimizer.eval()  # the library's own way there
        assert torch.equal(quiet.model.A, saved["A|value"])
        assert torch.equal(quiet.model.B, saved["B|value"])


def test_before_its_first_step_schedule_free_is_at_its_average(learner):
    own = learner("schedule_free")
    with own.at_average():
        assert torch.equal(own.model.A, Tiny().A)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "schedule_free"])
def test_the_learning_rate_of_a_group_is_its_factor_times_the_rate(learner, name):
    """Adam's first update is the learning rate in the gradient's direction, whatever its size."""
    own = learner(name, {"A": 0.5, "B": 16.0}, weight_decay=0)
    own.model.B.data.fill_(0.1)
    before = {n: p.detach().clone() for n, p in own.model.named_parameters()}
    own.train([0])
    with own.at_average():
        for leaf, factor in {"A": 0.5, "B": 16.0}.items():
            moved = (own.model.get_parameter(leaf) - before[leaf]).abs()
            torch.testing.assert_close(moved.median(), torch.tensor(factor * LR[name] / 3), rtol=0.02, atol=0)


def test_prodigy_tells_the_rate_that_it_finds(learner):
    own = learner("prodigy").train(range(MANY))
    found = optimizers.numbers(own.optimizer, "prodigy")
    assert found["prodigy_d"] > 5e-6
    assert optimizers.numbers(own.optimizer, "adamw") == {}


def test_factors_of_lora_plus_and_of_patterns():
    transformer = base.find(VARIANTS["tiny_wan"], "embedded", {}).meta_transformer()
    lora.inject(transformer, ["attn_ffn"], lora.Spec(4, 4, "dora"), 0)
    found = lora.lr_factors(transformer, 16, {"attn_ffn": 2, r"blocks\.0\..*": 0.5, r"blocks\.0\.attn2\.to_v": 3})
    assert found.keys() == lora.trainable_parameters(transformer).keys()
    for name, factor in found.items():
        module = 3 if name.startswith("blocks.0.attn2.to_v.") else 0.5 if name.startswith("blocks.0.") else 2
        assert factor == module * (16 if ".lora_B." in name else 1), name
    assert set(lora.lr_factors(transformer, 1, {}).values()) == {1}
    for nothing in ("proj_out", "blocks.0.attn3.to_q"):  # proj_out is a Linear, but not adapted
        with pytest.raises(UserError, match=r"optim\.lr_factors") as caught:
            lora.lr_factors(transformer, 1, {nothing: 2.0})
        assert caught.value.next_step == "mend the pattern of optim.lr_factors"


def test_groups_keep_the_order_of_the_factors():
    made = optimizers.groups({name: torch.nn.Parameter(torch.zeros(1)) for name in "abcd"},
                             {"a": 1.0, "b": 16.0, "c": 1.0, "d": 2.0})
    assert [(group["factor"], len(group["params"])) for group in made] == [(1.0, 2), (16.0, 1), (2.0, 1)]


@pytest.mark.parametrize(("schedule", "shape"), [
    ("constant", lambda p: 1.0), ("linear", lambda p: 1 - p), ("cosine", lambda p: math.cos(math.pi * p / 2) ** 2)])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 10), (4, 20), (1, 2)])
def test_schedules_are_their_closed_forms(schedule, shape, warmup, num_steps):
    rates = [engine.learning_rate(step, 3e-4, schedule, warmup, num_steps) for step in range(num_steps + 3)]
    for step, rate in enumerate(rates):
        share = (step + 1) / warmup if step < warmup else shape(min((step - warmup) / (num_steps - warmup), 1))
        assert rate == pytest.approx(3e-4 * share, rel=1e-12, abs=1e-19)
    assert rates[0] == pytest.approx(3e-4 / max(warmup, 1)), "the first step is not lost"
    assert rates[max(warmup - 1, 0)] == rates[warmup] == 3e-4
    assert all(rate > 0 for rate in rates[:num_steps]), "nor is the last"
    assert rates[num_steps] == pytest.approx(3e-4 if schedule == "constant" else 0, abs=1e-19)
    assert rates[num_steps:] == [rates[num_steps]] * 3


def test_the_average_is_the_recurrence_over_the_values_of_the_steps(learner):
    own = learner("adamw", mean_age=0.25)
    values = [checkpoint.values(own.train([step]).tensors(), "y") for step in range(STEPS)]
    weights = torch.ones(STEPS, dtype=torch.float64)  # by hand: step t keeps (1 - 1 / t)^3 of what was before
    for step in range(1, STEPS + 1):
        kept = (1 - 1 / step) ** 3
        weights[: step - 1] *= kept
        weights[step - 1] = 1 - kept
    for name, average in checkpoint.values(own.tensors()).items():
        expected = sum(weight * own[name].double() for weight, own in zip(weights, values, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mean_age", [0.05, 0.2, 0.5])
def test_the_mean_age_of_an_average_is_its_share_of_any_number_of_steps(mean_age):
    for num_steps in (200, 5000):
        weights, kept = [], 1.0
        for step in range(num_steps, 0, -1):
            weights.append(kept * share_at(step, mean_age))
            kept *= 1 - share_at(step, mean_age)
        assert sum(weights) == pytest.approx(1)
        age = sum(age * weight for age, weight in enumerate(weights)) / num_steps
        assert age == pytest.approx(mean_age, abs=0.01)


def test_the_average_does_not_feed_back(learner):
    with_it, without = learner("adamw", mean_age=0.2), learner("adamw")
    assert same_bits(checkpoint.values(with_it.train(range(3)).tensors(), "y"),
                     checkpoint.values(without.train(range(3)).tensors()))


@pytest.mark.slow
def test_train_export_and_sample_with_the_average(wantrain, tmp_path, capsys):
    """Through the verbs: what is exported and sampled is the average."""
    run = tmp_path / "run"
    more = ["optim.lora_plus=4", "optim.lr_factors={attn: 0.5}", "optim.ema=0.3"]
    assert wantrain("check", "optim.lr_factors={proj_out: 2}") == 2
    capsys.readouterr()
    assert wantrain("check", *more) == 0
    assert ("adamw, learning rate 0.001, 0.002, 0.004, 0.008, exported as an average of mean age 0.3 of the steps"
            in capsys.readouterr().out)
    assert wantrain("train", *more, "train.num_steps=2") == 0
    assert wantrain("train", *more) == 0
    assert wantrain("export", *more) == 0
    _, tensors = checkpoint.load(run / "checkpoints" / "step_000004", None)
    transformer = base.find(VARIANTS["tiny_wan"], "embedded", {}).meta_transformer()
    plain = base.find(VARIANTS["tiny_wan"], "embedded", {}).meta_transformer()
    lora.inject(transformer, ["attn_ffn"], lora.Spec(4, 4), 0)
    path = run / "export" / "demo_anime.safetensors"
    given = read_adapter(path, plain)
    own = lora.adapter_state(checkpoint.values(tensors), lora.scales(transformer))
    for module, leaves in own.tensors.items():
        theirs = given.tensors[module]
        torch.testing.assert_close(theirs["lora_B"] @ theirs["lora_A"] * given.scales[module],
                                   leaves["lora_B"] @ leaves["lora_A"] * own.scales[module])
    assert read_tensors(path)[1]["wantrain.ema"] == "0.3"
    averages, last = (checkpoint.values(tensors, key) for key in ("value", "y"))
    assert all(averages[name].any() and not torch.equal(last[name], averages[name])
               for name in averages if "lora_B" in name)
    assert wantrain("sample", *more, f"sampler.loras={path}", "sampler.strengths=[1]") == 0
    assert all(math.isfinite(json.loads(line)["loss"]) for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_validation_under_schedule_free_is_at_its_average_and_moves_nothing(wantrain, arguments, tmp_path):
    pytest.importorskip("schedulefree")
    kept = []
    for name, every in (("plain", 0), ("validated", 1)):
        assert wantrain("train", f"run.dir={tmp_path / name}", "optim.name=schedule_free", "train.num_steps=2",
                        f"validation.every_steps={every}") == 0
        kept.append(checkpoint.load(tmp_path / name / "checkpoints" / "step_000002", None)[1])
    assert same_bits(*kept)
    training = prepare(*opened([*arguments, "train.num_steps=2", "validation.every_steps=1", "optim.ema=null"]))
    for name, value in checkpoint.values(kept[0]).items():
        training.model.get_parameter(name).data.copy_(value)
    measuring = open_validation(training, Cached(training.clips))
    assert measuring is not None
    loss = measuring.numbers(2)["validation_loss"]
    told = (tmp_path / "validated" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(told)["validation_loss"] == loss


@pytest.mark.parametrize(("overrides", "said"), [
    (["optim.name=adagrad"], "adagrad"),
    (["optim.name=prodigy"], r"optim\.lr = 0\.002 is not allowed.*take 1\.0"),
    (["optim.name=prodigy", "optim.lr=1", "optim.lora_plus=2"], r"optim\.lora_plus = 2.*prodigy"),
    (["optim.name=prodigy", "optim.lr=1", "optim.lr_factors={attn: 2}"], r"optim\.lr_factors.*prodigy"),
    (["optim.name=schedule_free", "optim.schedule=cosine"], r"optim\.schedule = 'cosine'.*constant"),
    (["optim.name=schedule_free", "optim.betas=[0, 0.99]"], r"optim\.betas.*first"),
    (["optim.betas=[0.9, 1]"], r"optim\.betas.*\[0, 1\)"),
    (["optim.ema=0.99"], r"optim\.ema = 0\.99.*at most 0\.5"),
    (["optim.ema_decay=0.99"], r"optim\.ema_decay; did you mean optim\.ema\?"),
    (["optim.lora_plus=0"], r"optim\.lora_plus"),
    (["optim.lora_plus=16", "lora.kind=lokr"], r"optim\.lora_plus = 16.*lokr"),
    (["optim.lr_factors={attn: 0}"], r"optim\.lr_factors"),
    (["optim.warmup_steps=-1"], r"optim\.warmup_steps"),
])
def test_what_makes_no_sense_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load(["recipe=demo_anime", *overrides])


@pytest.mark.parametrize(("name", "package"), [(n, k.package) for n, k in OPTIMIZERS.items() if k.package])
def test_an_absent_package_is_told_with_the_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"optim.name = {name} needs the package {package}") as caught:
        optimizers.check(Accelerator(cpu=True), name)
    assert f'pip install "wantrain[{name}]"' in caught.value.next_step
    optimizers.check(Accelerator(cpu=True), "adamw")


def test_what_works_under_deepspeed_and_what_is_refused():
    allowed = {(name, stage) for name in OPTIMIZERS for stage in range(4) if not refused(name, stage)}
    assert allowed == {*((name, 0) for name in OPTIMIZERS), *(("adamw", stage) for stage in (1, 2, 3)),
                       ("schedule_free", 1), ("schedule_free", 2)}
    assert "ZeRO-3" in refused("schedule_free", 3)
    assert "Allowed: adamw, schedule_free" in refused("prodigy", 2)
    assert "offload" in refused("schedule_free", 2, offloads=True)
    assert refused("adamw", 2, offloads=True) == ""


def refused(name, stage, offloads=False):
    try:
        optimizers.refuse_under_zero(name, stage, offloads)
    except UserError as error:
        return error.message
    return ""


def test_a_checkpoint_of_a_version_without_a_key_goes_on_as_it_was_done_then(tmp_path):
    now = {"optim.name": "adamw", "optim.lora_plus": 1.0, "lora.rank": 4}
    tensors = {"a|value": torch.zeros(1)}
    path = checkpoint.save(CheckpointStore(tmp_path), Progress(1), tensors, Record({"lora.rank": 4}))
    assert checkpoint.load(path, now, formerly())[0] == Progress(1)
    with pytest.raises(UserError, match=r"optim\.lora_plus: 1\.0 -> 16\.0"):
        checkpoint.load(path, now | {"optim.lora_plus": 16.0}, formerly())
    with pytest.raises(UserError, match=r"optim\.ema: None -> 0\.15"):  # whose default came later
        checkpoint.load(path, now | {"optim.ema": 0.15}, formerly())
    with pytest.raises(UserError, match=r"lora\.rank: 4 -> 32"):
        checkpoint.load(path, now | {"lora.rank": 32}, formerly())
