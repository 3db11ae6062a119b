"""Several gloo processes that share one sample's tokens, against one process: loss, gradients, whole trainings."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelConfig
from diffusers.models.attention_dispatch import TemplatedUlyssesAttention

from tests.conftest import arguments_for
from tests.runs import assert_same_training
from tests.tiny_tasks import write_a14b
from wantrain import lora
from wantrain.models import sequence
from wantrain.models.encode import autocast, predict_velocity
from wantrain.models.fun import class_of
from wantrain.models.variants import VARIANTS, diffusers_config
from wantrain.terms import UserError

SHAPE = (3, 4, 8)
"""Latent frames, height and width: 24 tokens."""
CASES = {
    "tiny_wan": {}, "tiny_wan in checkpointed blocks": {"checkpointing": True}, "tiny_wan_i2v": {}, "tiny_wan_vace": {},
    "tiny_wan_ti2v": {"sigma_by_frame": True}, "tiny_wan in bfloat16": {"dtype": torch.bfloat16},
}


def adapted(name, dtype):
    """A tiny transformer with an adapter that does something on all its Linears."""
    variant = VARIANTS[name]
    sizes = diffusers_config(variant)
    for key, factor in {"num_attention_heads": 2, "attention_head_dim": 0.5}.items():  # some tiny ones have three heads
        sizes[key] = int(sizes[key] * factor)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = class_of(variant)(**sizes)
    for key, parameter in model.named_parameters():
        if not any(kept in key for kept in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    lora.inject(model, ["all_linear"], lora.Spec(4, 4.0), 0)
    generator = torch.Generator().manual_seed(2)
    for parameter in lora.trainable_parameters(model).values():
        parameter.data.normal_(std=0.1, generator=generator)
    if dtype == torch.bfloat16:  # as a GPU's autocast leaves them: there rms_norm gives float32
        for key, module in model.named_modules():
            if key.endswith(("norm_q", "norm_k")):
                module.register_forward_hook(lambda _, __, output: output.float())
    return model


def step(model, name, dtype, sigma_by_frame=False):
    """(loss, output, gradients by name) of two samples."""
    own, generator = VARIANTS[name].architecture, torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    target = draw(2, own.out_channels, *SHAPE)
    noisy, text = draw(2, own.in_channels, *SHAPE).to(dtype), draw(2, 512, own.text_dim).to(dtype)
    condition = {"image": draw(2, 1, 5, own.image_dim)} if own.image_dim else {}
    condition |= {"vace": draw(2, 96, *SHAPE)} if own.vace_layers else {}
    sigma = torch.tensor([[0.0, 0.7, 0.7], [0.4, 0.4, 0.4]]) if sigma_by_frame else torch.tensor([0.7, 0.4])
    with autocast(torch.device("cpu"), dtype):
        output = predict_velocity(model, noisy, sigma, text, condition)
    loss = (output.float() - target).square().mean()
    loss.backward()
    return loss.detach(), output.detach(), {key: p.grad for key, p in lora.trainable_parameters(model).items()}


def compare(case, checkpointing=False, dtype=torch.float32, **more):
    """Both in this process and shared with the other."""
    name = case.split()[0]
    loss, output, gradients = step(adapted(name, dtype), name, dtype, **more)
    shared = adapted(name, dtype)
    if checkpointing:
        shared.enable_gradient_checkpointing()
    sequence.share_tokens(shared, 2)
    own_loss, own_output, own_gradients = step(shared, name, dtype, **more)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    assert own_gradients.keys() == gradients.keys()
    for gradient in own_gradients.values():
        torch.distributed.all_reduce(gradient, torch.distributed.ReduceOp.SUM)  # gloo has no mean
    for key, own, wanted in (("loss", own_loss, loss), ("output", own_output, output),
                             *((key, own_gradients[key] / 2, wanted) for key, wanted in gradients.items())):
        torch.testing.assert_close(own, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()),
                                   msg=lambda message, key=key: f"{case}, {key}: {message}")


def facts():
    """What diffusers 0.42.1 cannot do, which shaped wantrain.models.sequence. When this fails, simplify there."""
    with pytest.raises(ZeroDivisionError):
        adapted("tiny_wan", torch.float32).enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    shared = adapted("tiny_wan", torch.bfloat16)
    sequence.share_tokens(shared, 2)
    attention_dispatch.TemplatedUlyssesAttention = TemplatedUlyssesAttention
    with pytest.raises(RuntimeError, match="query, key, and value to have the same dtype"):
        step(shared, "tiny_wan", torch.bfloat16)
    for config, error in ((ContextParallelConfig(ulysses_degree=2, ulysses_anything=True), "is not implemented yet"),
                          (ContextParallelConfig(ring_degree=2), "does not support return_lse=True")):
        ring = config.ring_degree
        mesh = torch.distributed.init_device_mesh("cpu", (ring, config.ulysses_degree),
                                                  mesh_dim_names=("ring", "ulysses"))
        config.setup(torch.distributed.get_rank(), 2, torch.device("cpu"), mesh)
        given = torch.zeros(1, 4, 2, 8, requires_grad=True)
        whole = type("Whole", (), {"context_parallel_config": config})
        with pytest.raises((NotImplementedError, ValueError), match=error):
            attention_dispatch.dispatch_attention_fn(given, given, given, parallel_config=whole).sum().backward()


def both(process_index, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=process_index, world_size=2,
                                         timeout=timedelta(minutes=1))
    for case, more in CASES.items():
        compare(case, **more)
    facts()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_loss_and_gradients_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(both, (str(tmp_path / "store"),), nprocs=2)


@pytest.fixture(scope="module")
def launched(forker, clips, cache_dir, cached, tmp_path_factory):
    """launched(engine, processes, overrides...) -> the run folder; engine None: one process without a launcher."""

    def call(engine, num_processes, *overrides, run_dir=None):
        run_dir = run_dir or tmp_path_factory.mktemp("sequence") / "run"
        forker.run(["train", *arguments_for(clips, cache_dir, run_dir), "train.micro_batch_size=2", *overrides],
                   run_dir.with_suffix(".log"), num_processes, engine)
        return run_dir

    return call


@pytest.fixture(scope="module")
def alone(launched):
    return launched(None, 1)


@pytest.mark.slow
@pytest.mark.long
def test_a_training_that_shares_tokens_is_that_of_one_process_and_goes_on_in_one(launched, alone):
    """Steps 1 and 2 by two processes together, 3 and 4 by one alone."""
    parts = launched("DDP", 2, "train.sequence_parallel=2", "train.num_steps=2")
    launched(None, 1, run_dir=parts)
    assert_same_training(alone, parts, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("launch", "num_parts", "rtol"), [
    (("DDP", 4), 2, 2e-5), pytest.param(("DDP", 3), 3, 2e-5, marks=pytest.mark.long),
    pytest.param(("ZeRO-2", 4), 2, 2e-5, marks=pytest.mark.long), (("ZeRO-3", 2), 2, 2e-4)])
def test_sharing_tokens_goes_with_data_parallel_and_zero(launched, alone, launch, num_parts, rtol):
    run = launched(*launch, f"train.sequence_parallel={num_parts}", "memory.keep=inputs")
    assert_same_training(alone, run, rtol)


@pytest.mark.slow
@pytest.mark.long
def test_the_base_answers_and_validates_with_shared_tokens(launched):
    own = ["data.sources.regularisation.preserve=true", "validation.every_steps=2", "optim.lr=0.02"]
    one = launched(None, 1, *own)
    assert_same_training(one, launched("DDP", 4, *own, "train.sequence_parallel=2"), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.long
def test_both_experts_share_tokens_one_after_the_other(launched, tmp_path):
    own = ["model.variant=tiny_wan_a14b", f"model.path={write_a14b(tmp_path)}"]
    one, three = launched(None, 1, *own), launched("DDP", 3, *own, "train.sequence_parallel=3")
    for expert in ("high", "low"):
        assert_same_training(one / expert, three / expert, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.long
def test_more_parts_than_processes_are_refused(launched):
    with pytest.raises(RuntimeError, match=r"train.sequence_parallel = 2 does not divide 1 process\(es\)"):
        launched(None, 1, "train.sequence_parallel=2")


@pytest.mark.parametrize(("name", "num_parts", "num_tokens", "says"), [
    ("wan21_t2v_1b3", 8, [32760], "the 12 attention heads of wan21_t2v_1b3. Allowed: 1, 2, 3, 4, 6, 12"),
    ("wan21_t2v_14b", 8, [32760, 1564], "does not divide clips of 1564 tokens"),
    ("wan22_animate_14b", 2, [32760], "diffusers cannot divide the tokens of wan22_animate_14b"),
])
def test_what_cannot_be_divided_is_named(name, num_parts, num_tokens, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        sequence.check(VARIANTS[name], num_parts, num_tokens)


def test_another_attention_is_refused():
    sequence.check(VARIANTS["wan21_t2v_14b"], 8, [32760])
    with (attention_dispatch.attention_backend("_native_math"),
          pytest.raises(UserError, match="DIFFUSERS_ATTN_BACKEND = _native_math")):
        sequence.check(VARIANTS["wan21_t2v_14b"], 8, [32760])
