"""The ComfyUI workflow of an export: ComfyUI's own reading of the graph, restated here, and what it would compute."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from wantrain.config import Config, load
from wantrain.models import comfy_nodes, comfy_workflow
from wantrain.models.comfy_workflow import FILES, Wanted, workflow
from wantrain.models.profiles import PROFILES
from wantrain.models.variants import VARIANTS
from wantrain.recipe.comfy import merged, prompt_of
from wantrain.recipe.sampler import settings_of

# Inputs of the nodes by name and order as ComfyUI's Python takes them, "?" where they may be left out. Written down
# from its functions (docs/facts.md, "ComfyUI nodes") and not from NODES.
PYTHON = {
    "UNETLoader": "unet_name weight_dtype", "CLIPLoader": "clip_name type device", "VAELoader": "vae_name",
    "CLIPVisionLoader": "clip_name", "CLIPVisionEncode": "clip_vision image crop", "CLIPTextEncode": "clip text",
    "LoraLoaderModelOnly": "model lora_name strength_model", "ModelSamplingSD3": "model shift",
    "KSampler": "model seed steps cfg sampler_name scheduler positive negative latent_image denoise",
    "KSamplerAdvanced": "model add_noise noise_seed steps cfg sampler_name scheduler positive negative latent_image "
                        "start_at_step end_at_step return_with_leftover_noise",
    "EmptyHunyuanLatentVideo": "width height length batch_size",
    "Wan22ImageToVideoLatent": "vae width height length batch_size start_image?",
    "WanImageToVideo": "positive negative vae width height length batch_size clip_vision_output? start_image?",
    "WanFirstLastFrameToVideo": "positive negative vae width height length batch_size clip_vision_start_image? "
                                "clip_vision_end_image? start_image? end_image?",
    "WanFunControlToVideo": "positive negative vae width height length batch_size clip_vision_output? start_image? "
                            "control_video?",
    "Wan22FunControlToVideo": "positive negative vae width height length batch_size ref_image? control_video?",
    "WanCameraEmbedding": "camera_pose width height length speed fx fy cx cy",
    "WanCameraImageToVideo": "positive negative vae width height length batch_size clip_vision_output? start_image? "
                             "camera_conditions?",
    "ImageScale": "image upscale_method width height crop", "VAEEncode": "pixels vae",
    "ReferenceLatent": "conditioning latent?",
    "WanVaceToVideo": "positive negative vae width height length batch_size strength control_video? control_masks? "
                      "reference_image?",
    "WanAnimateToVideo": "positive negative vae width height length batch_size clip_vision_output? reference_image? "
                         "face_video? pose_video? continue_motion_max_frames background_video? character_mask? "
                         "continue_motion? video_frame_offset",
    "WanSoundImageToVideo": "positive negative vae width height length batch_size audio_encoder_output? ref_image? "
                            "control_video? ref_motion?",
    "AudioEncoderLoader": "audio_encoder_name", "AudioEncoderEncode": "audio_encoder audio", "LoadAudio": "audio",
    "TrimVideoLatent": "samples trim_amount", "LoadImage": "image", "LoadVideo": "file", "GetVideoComponents": "video",
    "ImageToMask": "image channel", "VAEDecode": "samples vae", "CreateVideo": "images fps audio?",
    "SaveVideo": "video filename_prefix format codec",
}
PAGE_ONLY = ("control_after_generate", "upload")
WITHOUT = {"wan22_fun_5b_inp", "wan22_fun_5b_camera", "wan22_animate2_14b"}
"""Of these no workflow of ComfyUI was at hand."""
INPUTS = {"i2v": {"first": "a/photo.png"}, "flf2v": {"first": "x.png", "last": "y.png"}, "ti2v": {"first": "p.png"},
          "control": {"control": "pose.mp4", "first": "p.png"},
          "control_reference": {"control": "pose.mp4", "reference": "r.png", "first": "p.png"},
          "control_inpaint": {"control": "pose.mp4", "reference": "r.png"}, "camera": {"first": "p.png"},
          "camera_inpaint": {"first": "p.png"},
          "vace": {"control": "c.mp4", "control_mask": "m.mp4", "reference": "r.png"},
          "animate": {"control": "c.mp4", "face": "f.mp4", "reference": "r.png", "background": "b.mp4",
                      "control_mask": "m.mp4"},
          "s2v": {"audio": "a/voice.mp3", "reference": "r.png"}}


def config(*words: str) -> Config:
    return load(["recipe=demo_anime", "sampler.profile=comfy", "sampler.guidance=null", "sampler.num_steps=null",
                 "sampler.resolution=[480,832]", "sampler.num_frames=81", *words])


def wanted(name: str, inputs: dict[str, str], *words: str) -> Wanted:
    variant = VARIANTS[name]
    size = ["sampler.resolution=[704,1280]"] if variant.vae == "2.2" else []
    loras = {expert: [("style.safetensors" if expert is None else f"style_{expert}_noise.safetensors", 0.8)]
             for expert in variant.experts or (None,)}
    return Wanted(settings_of(config(*size, *words), variant), loras, "sqstyle, a house", 7, inputs, "style")


def prompt(document: dict[str, Any]) -> dict[int, tuple[str, dict[str, Any]]]:
    """What ComfyUI's page sends for a graph: of each node its inputs by name, a link as (node, slot).

    Widgets take the values in their order; one with a link is not sent; what the page keeps for itself neither.
    """
    links = {link[0]: (link[1], link[2]) for link in document["links"]}
    sent = {}
    for node in document["nodes"]:
        order = [name for name in comfy_nodes.NODES[node["type"]].widgets]
        values = dict(zip(order, node["widgets_values"], strict=True))
        linked = {own["name"]: links[own["link"]] for own in node["inputs"] if own["link"] is not None}
        sent[node["id"]] = (node["type"], {name: value for name, value in values.items() if name not in PAGE_ONLY}
                            | linked)
    return sent


def only(sent: dict[int, tuple[str, dict[str, Any]]], kind: str) -> dict[str, Any]:
    found, = [inputs for type_, inputs in sent.values() if type_ == kind]
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("given", [True, False])
def test_every_task_has_a_graph_that_comfyui_takes(name: str, given: bool) -> None:
    variant = VARIANTS[name]
    made = workflow(variant, wanted(name, INPUTS.get(variant.task, {}) if given else {}))
    assert comfy_nodes.faults(made) == []
    sent = prompt(json.loads(json.dumps(made)))
    for type_, inputs in sent.values():
        needed = [word for word in PYTHON[type_].split() if not word.endswith("?")]
        allowed = {word.rstrip("?") for word in PYTHON[type_].split()}
        assert set(needed) <= set(inputs) <= allowed, type_
        for value in inputs.values():
            assert not isinstance(value, tuple) or value[0] in sent
    assert "SaveVideo" in {type_ for type_, _ in sent.values()}
    assert only(sent, "CreateVideo")["fps"] == variant.fps
    if variant.task in INPUTS and given:
        names = {inputs.get(key) for type_, inputs in sent.values() if type_.startswith("Load")
                 for key in ("image", "file", "audio")}
        assert {path.rpartition("/")[2] for path in INPUTS[variant.task].values()} <= names


def test_every_variant_has_a_file_there_or_is_known_to_have_none() -> None:
    assert {name for name in VARIANTS if not name.startswith("tiny")} == {*FILES} | WITHOUT
    assert {own.comfy_name for own in PROFILES["comfy"].solvers.values()} == {"euler", "uni_pc", "dpmpp_2m"}
    assert comfy_workflow.VAE_FILES.keys() == {"2.1", "2.2"}


def test_a_reference_of_fun_reaches_both_texts() -> None:
    name = "wan21_fun_v11_14b_control"
    sent = prompt(workflow(VARIANTS[name], wanted(name, INPUTS["control_reference"])))
    sampled = only(sent, "KSampler")
    for side, slot in (("positive", 0), ("negative", 1)):
        kind, reference = sent[sampled[side][0]]
        assert kind == "ReferenceLatent"
        assert sent[reference["conditioning"][0]][0] == "WanFunControlToVideo"
        assert reference["conditioning"][1] == slot
        assert sent[reference["latent"][0]][0] == "VAEEncode"
    shown = sent[only(sent, "ImageScale")["image"][0]][1]["image"]
    assert shown == "r.png"
    assert only(sent, "CLIPVisionEncode")["image"] == only(sent, "ImageScale")["image"]


def test_definitions_are_those_of_the_functions() -> None:
    assert set(PYTHON) == set(comfy_nodes.NODES)
    for name, own in comfy_nodes.NODES.items():
        taken = {*own.inputs, *own.widgets} - set(PAGE_ONLY)
        assert taken == {word.rstrip("?") for word in PYTHON[name].split()}, name
        assert set(own.optional) == {word[:-1] for word in PYTHON[name].split() if word.endswith("?")}, name
        order = [word for word in PYTHON[name].split() if word in own.widgets]
        assert [word for word in own.widgets if word not in PAGE_ONLY] == order, name


def test_widget_values_stand_where_comfyuis_examples_have_them() -> None:
    """KSamplerAdvanced and the loaders as in ComfyUI's example for T2V-A14B (docs/facts.md, "ComfyUI nodes")."""
    made = workflow(VARIANTS["wan22_t2v_a14b"], wanted("wan22_t2v_a14b", {}, "sampler.num_steps=20"))
    values = [node["widgets_values"] for node in made["nodes"] if node["type"] == "KSamplerAdvanced"]
    assert values == [["enable", 7, "fixed", 20, 4.0, "euler", "simple", 0, 11, "enable"],
                      ["disable", 7, "fixed", 20, 3.0, "euler", "simple", 11, 10000, "disable"]]
    by_type = {node["type"]: node["widgets_values"] for node in made["nodes"]}
    assert by_type["CLIPLoader"] == ["umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", "default"]
    assert by_type["VAELoader"] == ["wan_2.1_vae.safetensors"]
    assert by_type["EmptyHunyuanLatentVideo"] == [832, 480, 81, 1]
    assert [node["widgets_values"] for node in made["nodes"] if node["type"] == "UNETLoader"] == [
        [f"wan2.2_t2v_{expert}_noise_14B_fp8_scaled.safetensors", "default"] for expert in ("high", "low")]


def chain(sent: dict[int, tuple[str, dict[str, Any]]], node: int) -> list[tuple[str, dict[str, Any]]]:
    """The nodes that a sampler's model comes through, from the sampler to the loader."""
    found = [sent[node]]
    while "model" in found[-1][1]:
        found.append(sent[found[-1][1]["model"][0]])
    return found[1:]


@pytest.mark.parametrize("name", ["wan22_t2v_a14b", "wan22_i2v_a14b"])
@pytest.mark.parametrize("words", [(), ("sampler.num_steps=20",), ("sampler.shift=5", "sampler.solver=unipc")])
def test_a_pair_computes_what_the_comfy_profile_does(name: str, words: tuple[str, ...]) -> None:
    """The sigmas of both KSamplerAdvanced, from their numbers alone, are the profile's, each on its expert's side."""
    own = wanted(name, INPUTS.get(VARIANTS[name].task, {}), *words)
    sent = prompt(workflow(VARIANTS[name], own))
    first, second = (node for node, (type_, _) in sent.items() if type_ == "KSamplerAdvanced")
    joined: list[float] = []
    for node, expert in ((first, "high"), (second, "low")):
        inputs = sent[node][1]
        (_, shifted), (lora_type, lora), (_, loader) = chain(sent, node)
        assert lora_type == "LoraLoaderModelOnly"
        assert (lora["lora_name"], lora["strength_model"]) == (f"style_{expert}_noise.safetensors", 0.8)
        assert loader["unet_name"] == FILES[name].format(expert)
        sigmas = sigmas_of(inputs["sampler_name"], inputs["steps"], shifted["shift"])
        joined += sigmas[inputs["start_at_step"] : inputs["end_at_step"]]
        boundary = 0.875 if "t2v" in name else 0.9
        taken = sigmas[inputs["start_at_step"] : inputs["end_at_step"]][: None if expert == "high" else -1]
        assert all((sigma >= boundary) == (expert == "high") for sigma in taken)
        assert inputs["cfg"] == own.settings.guidance[expert == "high"]
    assert sent[second][1]["latent_image"] == (first, 0)
    assert joined == pytest.approx(own.settings.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpmpp"])
def test_a_single_sampler_computes_what_the_comfy_profile_does(solver: str) -> None:
    own = wanted("wan21_t2v_1b3", {}, f"sampler.solver={solver}", "sampler.num_steps=30")
    sent = prompt(workflow(VARIANTS["wan21_t2v_1b3"], own))
    node, = (node for node, (type_, _) in sent.items() if type_ == "KSampler")
    inputs, ((_, shifted), (_, lora), (_, loader)) = sent[node][1], chain(sent, node)
    assert (lora["strength_model"], loader["unet_name"]) == (0.8, "wan2.1_t2v_1.3B_fp16.safetensors")
    sigmas = sigmas_of(inputs["sampler_name"], inputs["steps"], shifted["shift"])
    assert sigmas == pytest.approx(own.settings.sigmas.tolist(), abs=1e-6)
    assert (inputs["seed"], inputs["cfg"], inputs["denoise"]) == (7, 5.0, 1.0)
    texts = [sent[inputs[side][0]][1]["text"] for side in ("positive", "negative")]
    assert texts == ["sqstyle, a house", own.settings.negative_prompt]


def sigmas_of(sampler: str, steps: int, shift: float) -> list[float]:
    """KSampler.calculate_sigmas with `simple`: picked from a thousand; uni_pc leaves out the last but one, and ends at
    0.001 instead of 0.
    """
    taken = steps + (sampler == "uni_pc")
    table = [shift * (i + 1) / 1000 / (1 + (shift - 1) * (i + 1) / 1000) for i in range(1000)]
    picked = [table[-(1 + int(i * (1000 / taken)))] for i in range(taken)]
    return [*picked[:-1], 0.001] if sampler == "uni_pc" else [*picked, 0.0]


def test_references_are_cut_off_again_and_a_mask_is_one() -> None:
    sent = prompt(workflow(VARIANTS["wan21_vace_1b3"], wanted("wan21_vace_1b3", INPUTS["vace"])))
    start = next(node for node, (type_, _) in sent.items() if type_ == "WanVaceToVideo")
    trim = only(sent, "TrimVideoLatent")
    assert trim["trim_amount"] == (start, 3)
    assert sent[sent[start][1]["control_masks"][0]][0] == "ImageToMask"
    assert "reference_image" not in only(prompt(workflow(
        VARIANTS["wan21_vace_1b3"], wanted("wan21_vace_1b3", {"control": "c.mp4"}))), "WanVaceToVideo")
    animate = prompt(workflow(VARIANTS["wan22_animate_14b"], wanted("wan22_animate_14b", INPUTS["animate"])))
    assert only(animate, "TrimVideoLatent")["trim_amount"][1] == 3
    assert only(animate, "CLIPVisionEncode")["crop"] == "none", "as trained: the whole picture, squashed"


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda d: d["nodes"][0].update(type="UnetLoaderGGUF"), "there is no node UnetLoaderGGUF"),
    (lambda d: d["links"][0].__setitem__(5, "VAE"), "carries VAE"),
    (lambda d: node_of(d, "KSampler")["widgets_values"].pop(), "has 6 values"),
    (lambda d: node_of(d, "KSampler")["widgets_values"].reverse(), "is not"),
    (lambda d: node_of(d, "VAEDecode")["inputs"][0].update(link=None), "samples is not connected"),
    (lambda d: node_of(d, "VAEDecode")["inputs"].reverse(), "leads elsewhere"),
    (lambda d: node_of(d, "VAEDecode")["inputs"][0].update(name="latent"), "has the inputs"),
    (lambda d: node_of(d, "VAEDecode")["outputs"].clear(), "does not have the outputs"),
    (lambda d: d["links"][0].__setitem__(1, 99), "has no end at node 99"),
])
def test_what_comfyui_would_not_take_is_found(spoil: Any, said: str) -> None:
    made = copy.deepcopy(workflow(VARIANTS["wan21_t2v_1b3"], wanted("wan21_t2v_1b3", {})))
    spoil(made)
    assert any(said in fault for fault in comfy_nodes.faults(made))


def node_of(document: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in document["nodes"] if node["type"] == kind)


def test_the_prompt_holds_the_trigger_and_merged_loras_are_loaded_first() -> None:
    assert prompt_of(config("data.trigger=sq", "sampler.prompts=['a boat', 'sq, a house']")) == "sq, a house"
    assert prompt_of(config("data.trigger=sq", "sampler.prompts=['a boat']")) == "sq, a boat"
    assert prompt_of(config("data.trigger=sq", "sampler.prompts=[]")) == "sq"
    own = config("model.merge=['fast_{expert}.safetensors=0.5', other.safetensors]")
    assert merged(own, "high") == [("fast_high.safetensors", 0.5), ("other.safetensors", 1.0)]
    several = replace(wanted("wan21_t2v_1b3", {}), loras={None: [*merged(own, None), ("style.safetensors", 1.0)]})
    sent = prompt(workflow(VARIANTS["wan21_t2v_1b3"], several))
    node, = (node for node, (type_, _) in sent.items() if type_ == "KSampler")
    assert [inputs.get("lora_name") for _, inputs in reversed(chain(sent, node))] == [
        None, "fast_{expert}.safetensors", "other.safetensors", "style.safetensors", None]
