"""Every profile's grid against constants and against the tool's own arithmetic, every solver against tests/solvers.py,
for each task with its own steps and shift.
"""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests import solvers
from tests.solvers import Field, sampled
from wantrain.config import load
from wantrain.models import sampling
from wantrain.models.base import Base
from wantrain.models.conditioning import Encoders
from wantrain.models.profiles import FLOW, PROFILES
from wantrain.models.variants import VARIANTS
from wantrain.recipe.recipe import Recipe
from wantrain.recipe.sampler import sampler_settings
from wantrain.terms import Bucket, UserError

# profile, solver, shift, steps: the first two sigmas, that in the middle and the last two, in fractions by hand from
# what docs/facts.md, "Sampler", says of each grid.
CONSTANTS = {
    ("official", "unipc", 5, 50): (0.999800, 0.995732, 0.833055, 0.092507, 0.0),
    ("official", "unipc", 12, 40): (0.999917, 0.997783, 0.922935, 0.235110, 0.0),
    ("official", "dpmpp", 5, 50): (1.0, 0.995935, 0.833333, 0.092593, 0.0),
    ("official", "dpmpp", 16, 50): (1.0, 0.998726, 0.941176, 0.246154, 0.0),
    ("comfy", "euler", 8, 20): (1.0, 0.993464, 0.888889, 0.296296, 0.0),
    ("comfy", "euler", 5, 30): (1.0, 0.993221, 0.833333, 0.149648, 0.0),
    ("comfy", "unipc", 8, 20): (1.0, 0.993873, 0.898029, 0.459330, 0.001),
    ("comfy", "dpmpp", 8, 30): (1.0, 0.995752, 0.888889, 0.219709, 0.0),
    ("diffusers", "unipc", 3, 50): (0.999999, 0.993250, 0.750375, 0.060405, 0.0),
    ("diffusers", "dpmpp", 3, 40): (0.999666, 0.991189, 0.749625, 0.071361, 0.0),
    ("diffusers", "euler", 3, 50): (1.0, 0.993124, 0.743436, 0.008929, 0.0),
}


@pytest.mark.parametrize(("profile", "solver", "shift", "num_steps"), CONSTANTS)
def test_the_grid_is_what_is_stated(profile: str, solver: str, shift: float, num_steps: int) -> None:
    sigmas = PROFILES[profile].solver(solver).sigmas(num_steps, shift)
    assert len(sigmas) == num_steps + 1
    assert [*sigmas[[0, 1, num_steps // 2, -2, -1]]] == pytest.approx(CONSTANTS[profile, solver, shift, num_steps],
                                                                     abs=6e-7)


@pytest.mark.parametrize(("solver", "scheduler"), [
    ("unipc", lambda shift: UniPCMultistepScheduler(**FLOW, flow_shift=shift)),
    ("dpmpp", lambda shift: DPMSolverMultistepScheduler(**FLOW, flow_shift=shift)),
    ("euler", lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift))])
def test_diffusers_grids_are_those_of_its_schedulers(solver, scheduler) -> None:
    for shift in (1.0, 3.0, 5.0, 16.0):
        for num_steps in (1, 2, 8, 20, 40, 50):
            own = PROFILES["diffusers"].solver(solver)
            found, theirs = own.sigmas(num_steps, shift), scheduler(shift)
            theirs.set_timesteps(num_steps)
            assert found.tolist() == pytest.approx(theirs.sigmas.tolist(), abs=3e-7)
            assert own.timesteps(found[:-1]) == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("solver", PROFILES["comfy"].solvers)
def test_comfy_grids_are_picked_out_of_its_thousand_sigmas(solver: str) -> None:
    """Restated from comfy/model_sampling.py (ModelSamplingDiscreteFlow) and comfy/samplers.py (simple_scheduler,
    KSampler.calculate_sigmas; uni_pc leaves the penultimate sigma out): docs/facts.md, "Sampler".
    """
    for shift in (1.0, 5.0, 8.0, 12.0):
        t = torch.arange(1, 1001) / 1000
        table = shift * t / (1 + (shift - 1) * t)
        for num_steps in (2, 4, 6, 20, 30, 50):
            taken = num_steps + (solver == "unipc")
            picked = [float(table[-(1 + int(i * (1000 / taken)))]) for i in range(taken)] + [0.0]
            if solver == "unipc":
                picked = [*picked[:-2], 0.001]
            own = PROFILES["comfy"].solver(solver)
            found = own.sigmas(num_steps, shift)
            assert found.tolist() == pytest.approx(picked, abs=3e-7)
            assert own.timesteps(found[:-1]) == pytest.approx([1000 * sigma for sigma in picked[:-1]], abs=3e-4)


def reference(profile: str, solver: str, velocity, noise: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """The same trajectory in float64; ComfyUI's multistep solvers count in -log sigma."""
    exploding = {"exploding": True} if profile == "comfy" else {}
    if solver == "euler":
        return solvers.euler(velocity, noise, sigmas)
    if solver == "dpmpp":
        return solvers.dpmpp(velocity, noise, sigmas, **exploding)
    comfy = {"order": 3, "bh1": True} if profile == "comfy" else {}
    return solvers.unipc(velocity, noise, sigmas, **comfy, **exploding)


def told(profile: str, solver: str, sigma: float) -> float:
    """What the model is told: ComfyUI, and diffusers' Euler, do not cut it."""
    is_whole = profile != "comfy" and solver != "euler"
    return int(1000 * sigma) / 1000 if is_whole else sigma


PAIRS = [(profile, solver) for profile, own in PROFILES.items() for solver in own.solvers]
TASKS = ("wan21_t2v_1b3", "wan21_i2v_14b_480p", "wan21_flf2v_14b", "wan21_vace_14b", "wan22_t2v_a14b", "wan22_i2v_a14b",
         "wan22_ti2v_5b", "wan22_animate_14b", "wan21_fun_1b3_control")


def refuse_another_trajectory(profile: str, solver: str, name: str, num_steps: int) -> None:
    """Sample a variant with smooth fields in the place of its transformers, and compare with the same in float64."""
    variant = VARIANTS[name]
    noise = torch.randn(1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    fields = [Field(0.8), Field(-0.4)] if variant.experts else [Field()]
    shift = PROFILES[profile].shift_of(variant)
    settings = sampling.Settings(num_steps, (1.0, 1.0), shift, Bucket(1, 32, 32), "", 1.0, profile, solver)
    found, sigmas = sampled(name, fields, settings, noise), settings.sigmas.tolist()

    def velocity(x, sigma):
        seen = told(profile, solver, sigma)
        return fields[variant.boundary is not None and seen < variant.boundary].at(x, seen)

    parts = [sigmas]
    if profile == "comfy" and variant.boundary:  # a KSamplerAdvanced an expert, each with a solver of its own
        first = sum(sigma >= variant.boundary for sigma in sigmas)
        parts = [sigmas[: first + 1], sigmas[first:]]
    wanted = noise.double()
    for part in parts:
        wanted = reference(profile, solver, velocity, wanted, part)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-5, atol=3e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize(("profile", "solver"), PAIRS)
def test_every_solver_is_that_of_the_paper_for_every_task(profile: str, solver: str) -> None:
    for name in TASKS:
        refuse_another_trajectory(profile, solver, name, VARIANTS[name].num_steps)


@pytest.mark.parametrize(("profile", "solver"), PAIRS)
def test_few_steps_are_those_of_the_paper_too(profile: str, solver: str) -> None:
    """Where orders rise and fall again, and a step of a wrong order would show most."""
    for num_steps in (2, 3, 4, 5, 8):
        refuse_another_trajectory(profile, solver, "tiny_wan", num_steps)
    for num_steps in (4, 8):
        refuse_another_trajectory(profile, solver, "tiny_wan_a14b", num_steps)


def test_profiles_differ_from_each_other() -> None:
    noise = torch.randn(1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    settings = [sampling.Settings(20, (1.0, 1.0), 5.0, Bucket(1, 32, 32), "", 1.0, *pair) for pair in PAIRS]
    results = [sampled("tiny_wan", [Field()], own, noise) for own in settings]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-5 for other in results[:i]), PAIRS[i]


@pytest.mark.parametrize(("profile", "shifts"), [
    ("official", (5.0, 3.0, 16.0, 16.0, 12.0, 5.0, 5.0, 5.0, 3.0)), ("comfy", (8.0,) * 9),
    ("diffusers", (3.0, 3.0, 16.0, 3.0, 3.0, 3.0, 5.0, 5.0, 3.0))])
def test_a_profile_has_its_shift_unless_told_otherwise(profile: str, shifts: tuple[float, ...]) -> None:
    words = ["recipe=demo_anime", f"sampler.profile={profile}"]
    config = load(words)
    found = [sampler_settings(Recipe(config, Base(VARIANTS[name], {}))) for name in TASKS]
    assert [one.shift for one in found] == list(shifts)
    assert {(one.profile, one.solver) for one in found} == {(profile, None)}
    told_otherwise = load([*words, "sampler.shift=7", "sampler.solver=dpmpp"])
    settings = sampler_settings(Recipe(told_otherwise, Base(VARIANTS["tiny_wan"], {})))
    assert (settings.shift, settings.solver) == (7, "dpmpp")


def test_a_solver_that_the_tool_has_not_is_refused() -> None:
    for profile, own in PROFILES.items():
        for solver in ("unipc", "dpmpp", "euler"):
            words = ["recipe=demo_anime", f"sampler.profile={profile}", f"sampler.solver={solver}"]
            if solver in own.solvers:
                assert load(words).sampler.solver.name == solver
            else:
                with pytest.raises(UserError, match=r"sampler\.solver.*unipc or dpmpp"):
                    load(words)


class Remembers(torch.nn.Module):
    """Keeps the latents that it is given first: the noise of the sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.first = None

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.first = hidden_states if self.first is None else self.first
        return (torch.zeros_like(hidden_states),)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_noise_is_drawn_as_the_tool_draws_it(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI: torch.manual_seed, then randn of [1, 16, T, h, w] on the CPU; the others' numbers are the same there."""
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(sampling.torch, "randn", lambda *size, **how: drawn.append(how["generator"].device) or randn(
        *size, **how))
    monkeypatch.setattr(sampling, "encode_text", lambda *_: torch.zeros(4, 8))
    monkeypatch.setattr(sampling, "decode_latents", lambda vae, latents: latents)
    model = Remembers()
    pipeline = sampling.Pipeline(VARIANTS["wan21_t2v_1b3"], [model], None, Encoders(None, None), torch.float32)
    settings = sampling.Settings(2, (1.0, 1.0), 5.0, Bucket(5, 48, 64), "", 1.0, profile)
    sampling.sample(pipeline, "a square", 42, settings)
    generator = torch.manual_seed(42)
    torch.testing.assert_close(model.first, randn([1, 16, 2, 6, 8], generator=generator, device="cpu"), rtol=0, atol=0)
    assert drawn == [torch.device("cpu")]
    assert PROFILES[profile].draws_on_device == (profile == "official")
