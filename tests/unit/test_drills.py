"""What people type: each mistake ends at once in words that help, and what can only mean one thing is understood."""

from __future__ import annotations

import importlib
import os
import shlex
import sys

import pytest

from wantrain import cli, config, files
from wantrain.config import known
from wantrain.terms import UserError

RECIPE = "recipe=demo_anime"

# typed after the recipe -> what must be in the message
MISTAKES = {
    "sampler.profile=comfyui": ["sampler.profile", "comfy"],
    "sampler.solver=euler": ["sampler.solver", "unipc or dpmpp"],
    "sampler.formats=[gif]": ["sampler.formats", "webp and png"],
    "optim.lr=1e-4x": ["optim.lr = '1e-4x'", "a number such as 1e-4"],
    "optim.lr=0,0001": ["optim.lr", "comma", "0.0001"],
    "optim.lr=": ["optim.lr", "a number"],
    "memory.gib=24gb": ["memory.gib = '24gb'", "next: memory.gib=24"],
    "optim.lr=0.001f": ["optim.lr", "next: optim.lr=0.001"],
    "WANDB_MODE=offline": ["unknown config key WANDB_MODE", "next: WANDB_MODE=offline wantrain"],
    "demo_architecture": ["two recipes are named, demo_anime and demo_architecture"],
    "optim.lr=nan": ["optim.lr", "finite"],
    "optim.lr=-1e-4": ["optim.lr", "above 0"],
    "optim.betas=0.9": ["optim.betas", "two numbers"],
    "optim.name=adamw8bit": ["optim.name", "adamw_8bit"],
    "optim.name=AdamW": ["optim.name", "adamw"],
    "optim.shedule=cosine": ["optim.schedule"],
    "learning_rate=1e-4": ["unknown config key learning_rate"],
    "lr=1e-4": ["unknown config key lr", "optim.lr"],
    "rank=16": ["lora.rank"],
    "train.steps=100": ["unknown config key train.steps", "train.num_steps"],
    "train.num_step=100": ["train.num_steps"],
    "train.num_steps=1.5": ["train.num_steps", "whole number"],
    "train.num_steps=1000 steps": ["train.num_steps", "whole number"],
    "data.num_frames=[80]": ["data.num_frames", "4n+1"],
    "data.num_frames=80": ["data.num_frames", "4n+1"],
    "data.num_frames=[81": ["data.num_frames", "closing ]"],
    "data.resolutions=[[64]]": ["data.resolutions", "[height, width]"],
    "data.resolutions=[[65,97]]": ["data.resolutions = [65, 97]", "multiples of 16", "data.resolutions=[[64,96]]"],
    "data.resolutions=480p": ["data.resolutions", "in the form [[480, 832]]"],
    "lora.rnak=4": ["did you mean lora.rank?", "lora.rank=4    or wantrain train --help all"],
    "lora.rnak=many": ["did you mean lora.rank?", "next: wantrain train --help all"],
    "lora.rank 4": ["did you mean lora.rank=4?"],
    "train.activation_checkpointing=true": ["did you mean memory.keep?", "next: wantrain train --help all"],
    "recipe=/no/such/demo_anmie.yaml": ["there is no such file", "recipe=demo_anime    by its name"],
    "recipe=qqqq": ["recipe = 'qqqq' is not there; there are"],
    "data.trigger=": [],
    "data.mode=streaming": ["data.mode", "stream"],
    "data.batch_size=0": ["data.batch_size", "1 or more"],
    "data.caption_dropout=10": ["data.caption_dropout", "[0, 1]"],
    "data.cache_dir=/etc/hostname": ["data.cache_dir", "/etc/hostname", "a folder"],
    "run.dir=/etc/hostname/run": ["run.dir", "a folder"],
    "run.dir=..\\runs\\x": ["run.dir", "a path with / between its folders"],
    "data.source.style.path=x": ["data.sources"],
    "data.sources.style.paht=x": ["data.sources.style.paht"],
    "model.dtype=fp16": ["model.dtype", "bfloat16", "65,504"],
    "model.dtype=bf16": ["model.dtype", "bfloat16"],
    "model=wan2.1_t2v_1.3b": ["did you mean model=wan21_t2v_1b3"],
    "model=Wan21-T2V-14B": ["did you mean model=wan21_t2v_14b"],
    "tracker=wandb2": ["did you mean tracker=wandb"],
    "tracker.names=mlflow": ["tracker.names", "tensorboard or wandb"],
    "recipe=demo_anmie": ["did you mean recipe=demo_anime?"],
    "train.resume=true": ["train.resume", "auto is what true would mean"],
    "train.resume=no": ["train.resume", "never is what no would mean"],
    "data.allow_drops=maybe": ["data.allow_drops", "true or false"],
    "train.seed=2**64": ["train.seed", "whole number"],
    "train.seed=18446744073709551616": ["train.seed", "below 2^63"],
    "train.seed=-1": ["train.seed", "below 2^63"],
    "sampler.seeds=[9223372036854775808]": ["sampler.seeds", "below 2^63"],
    "sampler.seeds=[]": ["sampler.seeds", "at least one"],
    "export.format=comfyui": ["export.format", "universal is what ComfyUI loads"],
    "+lora.dropout=0.1": ["unknown config key lora.dropout"],
    "++lora.ranks=4": ["lora.rank"],
    "lora.kind=locon": ["lora.kind", "lokr"],
    "lora.targets=[]": ["lora.targets", "at least one"],
    "lora.rank_pattern={attn: much}": ["lora.rank_pattern", "whole number"],
    "lora.rank_pattern={attn}": ["lora.rank_pattern", "KEY: VALUE"],
    "lora.rank_pattern=4": ["lora.rank_pattern", "a dictionary"],
    "lora.rank=32,16": ["lora.rank", "whole number"],
    "run.name=": ["run.name", "a name is needed"],
    "run.name=a/b": ["run.name", "run.dir"],
    "sigma.range=[0,1000]": ["sigma.range", "[0, 1]", "timesteps"],
    "sigma.range=[0.5,0.5]": ["sigma.range"],
    "validation.sigmas=[500]": ["validation.sigmas", "timesteps"],
    "validation.sigmas=[0.5,0.5]": ["validation.sigmas", "each once"],
    "sampler.resolution=[65]": ["sampler.resolution", "[height, width]"],
    "sampler.num_steps=0": ["sampler.num_steps", "1 or more"],
    "sampler.num_steps=-3": ["sampler.num_steps", "1 or more"],
    "sampler.shift=0": ["sampler.shift", "above 0"],
    "sampler.guidance=nan": ["sampler.guidance", "finite"],
    "sampler.num_frames=16": ["sampler.num_frames", "4n+1"],
    "sampler.strengths=[]": ["sampler.strengths", "at least one"],
    "sampler.strengths=0,5": ["sampler.strengths", "[0.5] is one number, [0, 5] are two", "sampler.strengths=[0.5]"],
    "validation.sigmas=0,1e-3": ["validation.sigmas", "[0.1e-3] is one number, [0, 1e-3] are two"],
    "sampler.strengths=[1,inf]": ["sampler.strengths", "finite"],
    "sampler.strength=2": ["sampler.strength", "(0, 1]"],
    "sampler.prompts=['']": ["sampler.prompts", "not empty"],
    "sampler.inputs=[{frist: a.png}]": ["sampler.inputs", "first"],
    "data.trigger=a\0b": ["data.trigger", "NUL"],
    "~optim.lr": ["~optim.lr", "dictionary"],
    "--fast": ["unknown option --fast"],
    "--lora.rank=4": ["options are key=value", "lora.rank=4"],
    "style": ["'style' is no key=value"],
    "anime_1b4": ["did you mean recipe=anime_1b3"],
    "optim.lr": ["'optim.lr' is no key=value", "optim.lr=..."],
    "hydra.run.dir=x": ["unknown config key hydra.run.dir"],
    "lora.alpha=1e999": ["lora.alpha", "finite"],
    "loss.kind=l2": ["loss.kind"],
    "data.timeout_s=1e300": ["data.timeout_s", "1e8"],
    "data.limits={motion: 3}": ["data.limits.motion", "[low, high]"],
    "data.trigger=null": ["data.trigger", "text, which null is not"],
    "run.name=null": ["run.name", "text"],
    "tracker.names=wanbd": ["tracker.names", "wandb or tensorboard"],
    "sigma.range=0-1": ["sigma.range", "sigma.range=[0.0, 1.0]"],
    "optim.betas=[0.9;0.99]": ["optim.betas", "optim.betas=[0.9, 0.99]"],
    "optim.weight_decay=1e9": ["optim.weight_decay", "below 1 / optim.lr"],
    "optim=prodigy": ["did you mean optim.name=prodigy?"],
    "optim=adamw8bit": ["did you mean optim.name=adamw_8bit?"],
    "lora.start_from=runs/a/checkpoints/step_000004": ["lora.start_from", "export it first",
                                                        "lora.start_from=runs/a/export/NAME.safetensors"],
    "+data.sources.mine={paht: /x}": ["data.sources.mine.paht", "did you mean data.sources.mine.path"],
    "data.heldout=/in/${x}": ["data.heldout: it refers to ${x}, and there is no key x", "\\${x}"],
    "data.heldout=${data.triger}": ["data.heldout", "did you mean ${data.trigger}?"],
    "run.name=${run.name}": ["run.name", "refers to itself"],
    "run.name=${oc.env:NO_SUCH_NAME}": ["run.name", "environment variable NO_SUCH_NAME", "export NO_SUCH_NAME="],
    "run.name=${nope:1}": ["run.name", "${nope:...} is not known"],
    "run.name=a${": ["run.name", "not closed"],
    "optim.lr=${data.trigger}": ["optim.lr", "'celanime style' is no number"],
    "model.parts==1e-4,[],${assets:../..}": ["model.parts: it refers to '=1e-4,[],", "one value"],
    "data.num_frames=${train.seed}": ["data.num_frames: it refers to 0", "data.num_frames="],
    "sampler.resolution=${data.trigger}": ["sampler.resolution: it refers to"],
    "data.sources.style.columns=${data.trigger}": ["data.sources.style.columns: it refers to"],
    "train.num_steps:5": ["did you mean train.num_steps=5?"],
    "--num-steps=5": ["this one is train.num_steps=5"],
    "--resume": ["unknown option --resume", "train.resume=..."],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_says_key_value_and_what_is_allowed(typed, capsys):
    words = MISTAKES[typed]
    if not words:
        config.load([RECIPE, typed])
        return
    with pytest.raises(UserError) as caught:
        config.load([RECIPE, typed])
    for word in words:
        assert word in str(caught.value)
    assert caught.value.next_step
    assert "hydra" not in str(caught.value).replace("hydra.run.dir", "").lower(), "its words are passed on"


# typed after the recipe -> key, value
UNDERSTOOD = {
    "tracker.names=wandb": ("tracker.names", ["wandb"]),
    "model.merge=/loras/a.safetensors": ("model.merge", ["/loras/a.safetensors"]),
    "model.merge=[/loras/a.safetensors=0.8]": ("model.merge", ["/loras/a.safetensors=0.8"]),
    "model.merge=[/l/{expert}.safetensors, b=0.5]": ("model.merge", ["/l/{expert}.safetensors", "b=0.5"]),
    "sampler.loras=[/l/{expert}.safetensors=0.5/1, b]": ("sampler.loras", ["/l/{expert}.safetensors=0.5/1", "b"]),
    "sampler.formats=webp": ("sampler.formats", ["webp"]),
    "lora.start_from=/loras/{expert}, new [v2].safetensors": ("lora.start_from",
                                                              "/loras/{expert}, new [v2].safetensors"),
    "lora.start_from=epoch=1-step=500.ckpt": ("lora.start_from", "epoch=1-step=500.ckpt"),
    "data.heldout=/in/a=b": ("data.heldout", "/in/a=b"),
    "data.heldout=/in/a,b": ("data.heldout", "/in/a,b"),
    "data.heldout=/in/my clips (2026)": ("data.heldout", "/in/my clips (2026)"),
    "data.heldout=/in/été/日本": ("data.heldout", "/in/été/日本"),
    "data.heldout=C:\\Users\\me\\clips": ("data.heldout", "C:\\Users\\me\\clips"),
    "data.heldout=/in/it's": ("data.heldout", "/in/it's"),
    "data.heldout='/in/a b'": ("data.heldout", "/in/a b"),
    "data.trigger=日本スタイル": ("data.trigger", "日本スタイル"),
    "data.trigger=my style, v2": ("data.trigger", "my style, v2"),
    "data.trigger=123": ("data.trigger", "123"),
    "data.trigger=true": ("data.trigger", "true"),
    "data.trigger=100%: new!": ("data.trigger", "100%: new!"),
    "run.name=my run": ("run.name", "my run"),
    "optim.betas=0.9,0.95": ("optim.betas", [0.9, 0.95]),
    "optim.lr=5E-5": ("optim.lr", 5e-5),
    "train.num_steps=1e3": ("train.num_steps", 1000),
    "train.num_steps=1_000": ("train.num_steps", 1000),
    "data.allow_drops=True": ("data.allow_drops", True),
    "data.num_frames=17": ("data.num_frames", [17]),
    "sampler.strengths=0,0.5": ("sampler.strengths", [0, 0.5]),
    "optim.betas=0.9,0.99": ("optim.betas", [0.9, 0.99]),
    "sampler.strengths=[0,5]": ("sampler.strengths", [0, 5]),
    "data.num_frames=1,17": ("data.num_frames", [1, 17]),
    "data.resolutions=64x96": ("data.resolutions", [[64, 96]]),
    "data.resolutions=[[64,96],[96,64]]": ("data.resolutions", [[64, 96], [96, 64]]),
    "sampler.resolution=64x96": ("sampler.resolution", [64, 96]),
    "sampler.prompts=a house": ("sampler.prompts", ["a house"]),
    "sampler.prompts=a house, standing still": ("sampler.prompts", ["a house, standing still"]),
    "sampler.prompts=['a house, still', \"it's red\"]": ("sampler.prompts", ["a house, still", "it's red"]),
    "sampler.prompts=[a house: red (old), b]": ("sampler.prompts", ["a house: red (old)", "b"]),
    "lora.targets=[blocks\\.[0-3]\\.attn1\\.(to_q|to_k)]": ("lora.targets", ["blocks\\.[0-3]\\.attn1\\.(to_q|to_k)"]),
    "lora.targets=blocks\\.\\d{1,2}\\..*": ("lora.targets", ["blocks\\.\\d{1,2}\\..*"]),
    "lora.rank_pattern={attn:2}": ("lora.rank_pattern", {"attn": 2}),
    "lora.rank_pattern={'blocks\\.0\\..*': 4, attn: 2}": ("lora.rank_pattern", {"blocks\\.0\\..*": 4, "attn": 2}),
    "lora.rank_pattern.attn=2": ("lora.rank_pattern", {"attn": 2}),
    "data.limits={motion: [0.1, null]}": ("data.limits", {"motion": [0.1, None]}),
    "sampler.inputs=[{video: 'my, film.mp4'}]": ("sampler.inputs", [{"video": "my, film.mp4"}]),
    "sampler.guidance=null": ("sampler.guidance", None),
    "train.mirror=s3://bucket/a=b": ("train.mirror", "s3://bucket/a=b"),
    "+train.seed=3": ("train.seed", 3),
    "data.sources.style={path: /a b, repeats: 2}": ("data.sources.style.path", "/a b"),
    "data.sources.mine=/my clips": ("data.sources.mine.path", "/my clips"),
    "data.resolutions=[64,96]": ("data.resolutions", [[64, 96]]),
    "data.resolutions=[64x96, 96x64]": ("data.resolutions", [[64, 96], [96, 64]]),
    "tracker.names=wandb, tensorboard": ("tracker.names", ["wandb", "tensorboard"]),
    "model.merge=[{expert}.safetensors, {expert}/b.safetensors=0.5]": (
        "model.merge", ["{expert}.safetensors", "{expert}/b.safetensors=0.5"]),
    "model.parts.vae=/x y.safetensors": ("model.parts", {"vae": "/x y.safetensors"}),
}


def at(composed, key):
    for part in key.split("."):
        composed = composed[part] if isinstance(composed, dict) else getattr(composed, part)
    return composed


def test_what_is_typed_is_understood_without_quotes_of_ours():
    """As many in one command line as have different keys: composing costs most of the time."""
    rounds: list[dict[str, str]] = []
    for typed, (key, _) in UNDERSTOOD.items():
        free = next((one for one in rounds if key not in one), None)
        if free is None:
            rounds.append(free := {})
        free[key] = typed
    for one in rounds:
        composed = config.load([RECIPE, *one.values()])
        for key, typed in one.items():
            assert at(composed, key) == UNDERSTOOD[typed][1], typed
    with pytest.raises(UserError, match=r"sampler\.inputs"):
        config.load([RECIPE, "sampler.inputs=[{first: my, pic.png}]"])


def test_sources_on_the_command_line():
    for typed in (["+data.sources.mine={path: /my clips, repeats: 2}"], ["data.sources.mine.path=/my clips",
                                                                         "data.sources.mine.repeats=2"]):
        sources = config.load([RECIPE, *typed]).data.sources
        assert list(sources) == ["style", "regularisation", "mine"]
        assert (sources["mine"].path, sources["mine"].repeats) == ("/my clips", 2.0)
    assert list(config.load([RECIPE, "~data.sources.regularisation"]).data.sources) == ["style"]
    with pytest.raises(UserError, match=r"data\.sources\.mine\.path"):
        config.load([RECIPE, "data.sources.mine.repeats=2"])


def test_a_bare_recipe_name_is_understood_and_other_words_are_told():
    assert config.load(["demo_anime", "lora.rank=4"]).run.name == "demo_anime"
    for typed, said in ((["recipe", "demo_anime"], "did you mean recipe=demo_anime?"),
                        (["--recipe=demo_anime"], "this one is recipe=demo_anime"),
                        (["--recipe", "demo_anime"], "recipe=demo_anime"), ([], "recipe="),
                        (["recipe:", "demo_anime"], "did you mean recipe=demo_anime?"),
                        (["recipe", "=demo_anime"], "did you mean recipe=demo_anime?")):
        with pytest.raises(UserError, match="recipe") as caught:
            config.load(typed)
        assert said in str(caught.value)


def test_a_comma_that_splits_prompts_is_told_with_what_would_not(capsys):
    config.load([RECIPE, "sampler.prompts=[a red house, standing still]"])
    said = capsys.readouterr().err
    assert "a comma splits prompts" in said
    whole = shlex.split(said.partition("For one prompt: ")[2])[0]
    assert config.load([RECIPE, whole]).sampler.prompts == ["a red house, standing still"]


RECIPES = {
    "train:\n\tnum_steps: 5\n": (":5: a tab is no indentation in YAML", "sed -i"),
    "train: {num_steps: 5\n": (":4: ", "mend that line"),
    "train: {num_steps: 5}\noptim: {lr: 1}\ntrain: {seed: 1}\n": (":6: train stands twice, first in line 4",),
    "train:\n  num_step: 5\n": (":5: unknown config key train.num_step; did you mean train.num_steps",),
    "train:\n  num_steps: many\n": (":5: train.num_steps = 'many' is not allowed: a whole number",),
    "train:\nnum_steps: 5\n": (":4: train holds keys of its own",),
    "lora: {kind: locon}\n": (":4: lora.kind = 'locon'", "lokr"),
    "data:\n  sources:\n    style: {paht: x}\n": (":6: unknown config key data.sources.style.paht",),
    "sampler: {prompts: 3: 4}\n": (":4: ",),
    "- a\n- b\n": ("mend that line",),
    "data: {trigger: yes}\n": (":4: data.trigger = 'yes'", "YAML takes this for True", "'yes'"),
    "sampler: {strengths: 0,5}\n": (":4: sampler.strengths = '0'", "a list"),
    "sampler:\n  strengths: 0,5\n": (":5: sampler.strengths = '0,5'", "[0.5] is one number", "strengths: [0.5]"),
    "run: {name: 007}\n": (":4: run.name = '007'", "YAML takes this for 7", "'007'"),
    "sampler: {prompts: [a house, on]}\n": (":4: sampler.prompts = 'on'", "wants quotes"),
    "data:\n  trigger:\n": (":5: data.trigger = ''", "for null", "write '' there"),
    "train: {num_steps: 010}\n": (":4: train.num_steps = '010'", "YAML takes this for 8"),
    "train: {num_steps: 1e3}\n": (":4: train.num_steps = '1e3'", "write 1000 there"),
    "tracker: {names: wandb}\n": (":4: tracker.names = 'wandb'", "names: [wandb]"),
    "sampler: {prompts: 'a house, still'}\n": (":4: sampler.prompts", "prompts: ['a house, still']"),
    "data: {num_frames: 81}\n": (":4: data.num_frames", "num_frames: [81]"),
    "data: {resolutions: [64, 96]}\n": (":4: data.resolutions", "resolutions: [[64, 96]]"),
    "model: {parts: {1: x}}\n": (":4: model.parts = '1'", "'1'"),
    "data:\n  sources:\n    style: clips\n": (":6: data.sources.style", "style: {path: VALUE}"),
    "train.num_steps: 5\n": (":4: unknown config key train.num_steps", "train: {num_steps: ...}"),
    "data: {heldout: \"C:\\Users\"}\n": (":4: ", "single quotes"),
    "hydra: {run: {dir: x}}\n": (":4: unknown config key hydra",),
    "  - model: tiny_wan\n": (":4: ", "- override /model: tiny_wan"),
    "  - mine\n": ("lead back to itself",),
    "  - override /optim: prodigy\n": (":3: ", "optim.name=prodigy"),
}


def test_a_recipe_says_by_quotes_or_by_a_tag_that_a_word_is_text(tmp_path):
    (tmp_path / "recipe").mkdir()
    path = tmp_path / "recipe" / "mine.yaml"
    path.write_text("""# @package _global_
defaults: [demo_anime, _self_]
run: {name: !!str 007}
data:
  trigger: !!str yes
  heldout: !!str null
sampler: {prompts: [!!str on, 'off', &x !!str 1:30, *x]}
""")
    composed = config.load(["recipe=mine"], tmp_path)
    assert (composed.run.name, composed.data.trigger, composed.data.heldout) == ("007", "yes", "null")
    assert composed.sampler.prompts == ["on", "off", "1:30", "1:30"]


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_with_a_fault_is_named_with_its_line(tmp_path, text):
    (tmp_path / "recipe").mkdir()
    path = tmp_path / "recipe" / "mine.yaml"
    path.write_text("# @package _global_\ndefaults:\n  - demo_anime\n" + text)
    with pytest.raises(UserError) as caught:
        config.load(["recipe=mine"], tmp_path)
    assert str(path) in str(caught.value)
    for words in RECIPES[text]:
        assert words in str(caught.value)


def test_a_recipe_without_its_package_line_or_with_a_base_that_is_not_there(tmp_path):
    (tmp_path / "recipe").mkdir()
    path = tmp_path / "recipe" / "mine.yaml"
    path.write_text("defaults:\n  - demo_anime\n  - _self_\ntrain: {num_steps: 5}\n")
    with pytest.raises(UserError, match="the first line must be # @package _global_") as caught:
        config.load(["recipe=mine"], tmp_path)
    assert str(path) in caught.value.next_step
    for text, said in (("# @package foo\ndefaults: [demo_anime]\n", "s/^#"), ("", "it is empty"),
                       ("\ufeff# @package _global_\n", "byte order mark")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"mine\.yaml:1: ") as caught:
            config.load(["recipe=mine"], tmp_path)
        assert said in str(caught.value)
    path.write_text("# @package _global_\nrun: {name: mine}\n")
    with pytest.raises(UserError, match="the recipe chooses no model; there are tiny_wan"):
        config.load(["recipe=mine"], tmp_path)
    path.write_text("# @package _global_\ndefaults:\n  - demo_anmie\n")
    with pytest.raises(UserError, match=r":3: recipe = 'demo_anmie' is not there; did you mean recipe=demo_anime\?"):
        config.load(["recipe=mine"], tmp_path)
    path.write_bytes(b"# @package _global_\nrun: {name: \xe9}\n")
    with pytest.raises(UserError, match=r":2: a recipe is a text file in UTF-8"):
        config.load(["recipe=mine"], tmp_path)
    path.write_text("# @package _global_\ndefaults: [demo_anime, _self_]\nrun: {name: own}\noptim: {lr: 5e-5}\n")
    for folder in ("--config-dir=" + str(tmp_path), "--config-dir=" + str(tmp_path / "recipe"),
                   f"--config_dir={tmp_path}", f"config-dir={tmp_path}"):
        given, others = cli._config_dir([folder, "recipe=mine"])
        assert config.load(others, given).optim.lr == 5e-5


def test_the_recipes_for_real_wan_take_the_samplers_numbers_from_the_variants_table():
    names = config.recipes()
    assert len(names) == 13
    for name in names:
        composed = config.load([f"recipe={name}"])
        own = composed.sampler
        assert own.prompts, name
        assert all(prompt.startswith(f"{composed.data.trigger}, ") for prompt in own.prompts), name
        assert composed.evaluate.prompts, name
        assert not any(composed.data.trigger in prompt for prompt in composed.evaluate.prompts), name
        text = (config.configs_folder() / "recipe" / f"{name}.yaml").read_text()
        head = [line for line in text.splitlines() if line.startswith("#")]
        command = f"# make demo RECIPE={name}" if name.startswith("demo_") else f"# wantrain train recipe={name} "
        assert head[0] == "# @package _global_", name
        assert head[1].startswith(command), name
        assert "xpect" in " ".join(head), name
        if name.startswith("demo_"):
            continue
        assert "# Cost by `wantrain plan`, largest clips: rtx4090 " in text, name
        known = " ".join(line.removeprefix("# ") for line in head).partition("Known (docs/recipes.md): ")[2]
        assert known.startswith("measured on Wan nothing, no GPU has run it; "), name
        assert "by public results on other models " in known.partition("Not known: ")[0], name
        assert "learning rate, steps" in known.partition("Not known: ")[2], name
        assert (own.num_steps, own.guidance, own.shift, own.num_frames, own.resolution) == (None,) * 5, name
        assert "celanime" not in text
        assert "blueprnt" not in text
        assert "demo_" not in text, "a toy's numbers would come along"
        own_trigger = config.load([f"recipe={name}", "data.trigger=other words"]).sampler.prompts
        assert all(prompt.startswith("other words, ") for prompt in own_trigger)


def test_left_over_variables_of_a_launcher(monkeypatch, capsys):
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["inspect"]) == 2
    assert "note: RANK=1 in the environment, and no MASTER_ADDR" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", RECIPE]) == 75
    said = capsys.readouterr().err
    assert "process 1 of 2 cannot be met" in said
    assert "unset RANK WORLD_SIZE" in said
    monkeypatch.setenv("RANK", "one")
    assert cli.main(["check", RECIPE]) == 2
    assert "RANK=one is set, and is no number" in capsys.readouterr().err


def test_the_words_of_wandb_mode(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    config.load([RECIPE])
    with pytest.raises(UserError, match="WANDB_MODE = 'ofline' is not allowed: online, offline or disabled"):
        config.load([RECIPE, "tracker=wandb"])


def test_what_follows_from_the_variant_is_refused_before_anything_heavy():
    for typed, said in ((["lora.rank=100000"], "above what any module of tiny_wan has: 192"),
                        (["lora.rank_pattern={attn: 193}"], "above what any module of tiny_wan has: 192"),
                        (["recipe=anime_a14b", "high.rank=5121"], "above what any module of wan22_t2v_a14b has: 5120"),
                        (["high.rank=4"], "tiny_wan has one transformer"),
                        (["model.experts=high"], "tiny_wan has one transformer"),
                        (["model.variant=wan21_t2v_1.3b"], "allowed: wan21_t2v_1b3"),
                        (["sampler.resolution=[65,97]"], "both must be multiples of 16 for tiny_wan")):
        with pytest.raises(UserError) as caught:
            config.load([RECIPE, *typed])
        assert said in str(caught.value)
        again = shlex.split(caught.value.next_step.partition("    ")[0])
        assert config.load([RECIPE, *typed[:-1], *again]).run.name, "what is printed can be pasted in its place"


@pytest.mark.slow
def test_every_rules_remedy_can_be_pasted():
    """In the mistake's place. `...` stands where nobody can know the value."""
    tried = 0
    for typed, words in MISTAKES.items():
        if not words:
            continue
        with pytest.raises(UserError) as caught:
            config.load([RECIPE, typed])
        step = caught.value.next_step.partition("    ")[0]
        key = typed.lstrip("+").partition("=")[0]
        if step.strip("'").startswith(f"{key}=") and "..." not in step and caught.value.message.startswith(key):
            config.load([RECIPE, *shlex.split(step)])
            tried += 1
    assert tried > 30


def test_words_of_other_trainers_are_keys_here():
    for word, key in known.ELSEWHERE.items():
        assert known.annotation(key) is not None, word
        with pytest.raises(UserError, match=f"did you mean {key}"):
            config.load([RECIPE, f"train.{word}=1"])


def test_clips_that_are_not_there_are_told_before_libraries_are_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    imported = importlib.import_module

    def light(name, package=None):
        assert not name.startswith("wantrain.stages"), "what is behind a verb takes seconds"
        return imported(name, package)

    monkeypatch.setattr(importlib, "import_module", light)
    for typed, said in (("data.sources.style.path=/no/such", "data.sources.style.path = '/no/such' does not exist"),
                        ("data.heldout=my\\clips", "a backslash parts no folders here")):
        for verb in ("check", "report", "cache", "train") if "\\" in typed else ("train",):
            assert cli.main([verb, RECIPE, typed]) == 2
            assert said in capsys.readouterr().err
    assert cli.main(["inspect"]) == 2
    assert "wantrain inspect FILE" in capsys.readouterr().err
    for there in ("hf://datasets/a/b", "*.tar", "s3://bucket/x"):
        config.refuse_absent_clips(config.load([RECIPE, f"data.heldout={there}"]))


@pytest.mark.parametrize(("typed", "again"), [
    (["check", RECIPE, "data.cache_dir=C:\\my cache"], ["check", RECIPE, "data.cache_dir=/mnt/c/my cache"]),
    (["check", "sampler.inputs=[C:\\x.png]"], ["check", "sampler.inputs=[/mnt/c/x.png]"]),
    (["prepare", "D:/films", "--trigger", "a b"], ["prepare", "/mnt/d/films", "--trigger", "a b"]),
    (["convert", "a.safetensors", "e:\\b\\c.safetensors"], ["convert", "a.safetensors", "/mnt/e/b/c.safetensors"])])
def test_a_drive_of_windows_is_no_folder_here(typed, again, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(typed) == 2
    said = capsys.readouterr().err
    assert "is a path of Windows" in said
    assert shlex.split(said.partition("next: ")[2]) == ["wantrain", *again]
    assert not list(tmp_path.iterdir())


def test_a_recipe_and_a_manifest_written_on_windows_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# @package _global_\ndefaults: [demo_anime, _self_]\n")
    assert config.load(["recipes\\mine.yaml"]).data.trigger == "celanime style"
    assert files.of_windows("clips\\a b.mp4") == "clips/a b.mp4"
    assert files.of_windows("C:\\clips\\a.mp4") == "/mnt/c/clips/a.mp4"
    assert files.of_windows("ab:\\c") == "ab:/c"


@pytest.mark.parametrize(("typed", "said", "meant"), [
    (["prune", "cache", "delete=true"], "delete=true is not allowed: no, yes", "wantrain prune cache delete=yes"),
    (["prune", "cache", "dlete=yes"], "dlete=yes is not known; there are delete, verify",
     "wantrain prune cache delete=yes    or wantrain prune --help"),
    (["convert", "a.safetensors", "b.safetensors", "dtype=bf16"], "dtype=bf16 is not allowed",
     "wantrain convert a.safetensors b.safetensors dtype=bfloat16"),
    (["convert", "a.safetensors", "b.safetensors", "format=comfyui"], "format=comfyui is not allowed",
     "wantrain convert a.safetensors b.safetensors format=universal"),
    (["extract", "a", "b", "c", "rank=zero"], "rank=zero is not allowed: a whole number from 1",
     "wantrain extract --help"),
    (["doctor", "here"], "doctor takes no file, and got 1: here", "wantrain doctor")])
def test_options_of_file_verbs_are_told_with_the_nearest_right_ones(capsys, typed, said, meant):
    assert cli.main(typed) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.endswith(f"  next: {meant}\n")


def test_a_folder_with_signs_of_a_pattern_in_its_name_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = [RECIPE, "data.heldout=Vidéos/[neu] (1)"]
    with pytest.raises(UserError, match="does not exist"):
        config.refuse_absent_clips(config.load(typed))
    (tmp_path / "Vidéos" / "[neu] (1)").mkdir(parents=True)
    config.refuse_absent_clips(config.load(typed))
    config.refuse_absent_clips(config.load([RECIPE, "data.heldout=Vidéos/shard-[0-9].tar"]))


def test_a_prompt_without_the_trigger_is_told(capsys):
    config.tell_untriggered(config.load([RECIPE]))
    assert capsys.readouterr().err == ""
    config.tell_untriggered(config.load([RECIPE, "sampler.prompts=[celanime style, 'a house']"]))
    assert "1 of 2 sampler.prompts do not hold the trigger 'celanime style': a house;" in capsys.readouterr().err


def test_help_ends_quietly_when_nobody_reads_on_and_its_defaults_are_yaml(monkeypatch, capsys):
    assert cli.main(["train", "--help", "all"]) == 0
    shown = capsys.readouterr().out
    for line in ("  memory.keep = auto", "  train.mirror = null", "  optim.betas = [0.9, 0.99]",
                 "  model.dtype = bfloat16", "  lora.targets = [attn_ffn]", "  optim.eps = 1e-08",
                 "  data.trigger = ''"):
        assert f"{line}\n" in shown
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert cli.main(["train", "--help", "all"]) == 0
