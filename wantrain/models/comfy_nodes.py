"""ComfyUI's core nodes that workflows of wantrain are made of, and what is wrong with a graph of them.

Where each definition was read stands in docs/facts.md, "ComfyUI nodes".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wantrain.models.profiles import PROFILES

INT, FLOAT, STRING = int, float, str
Kind = type | tuple[str, ...]
"""What a widget's value may be: of this type, or one of these."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A node as ComfyUI defines it: inputs that take links, widgets in the order of their values, and outputs.

    `optional` inputs may be left open. A widget's input may take a link in the place of its value.
    """

    inputs: Mapping[str, str]
    widgets: Mapping[str, Kind]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()


CAMERA_MOVES = ("Static", "Pan Up", "Pan Down", "Pan Left", "Pan Right", "Zoom In", "Zoom Out", "Anti Clockwise (ACW)",
                "ClockWise (CW)")
_AFTER = ("fixed", "increment", "decrement", "randomize")
_SAMPLERS = tuple(solver.comfy_name for solver in PROFILES["comfy"].solvers.values())
_TEXTS = {"positive": "CONDITIONING", "negative": "CONDITIONING"}
_TO_VIDEO = {**_TEXTS, "vae": "VAE"}
_SIZE: dict[str, Kind] = {"width": INT, "height": INT, "length": INT, "batch_size": INT}
_OUT = ("CONDITIONING", "CONDITIONING", "LATENT")
_SAMPLED = {"model": "MODEL", **_TEXTS, "latent_image": "LATENT"}


def _to_video(outputs: tuple[str, ...] = _OUT, widgets: Mapping[str, Kind] | None = None, **optional: str
              ) -> Definition:
    return Definition({**_TO_VIDEO, **optional}, {**_SIZE, **(widgets or {})}, outputs, tuple(optional))


NODES = {
    "UNETLoader": Definition({}, {"unet_name": STRING, "weight_dtype": ("default", "fp8_e4m3fn")}, ("MODEL",)),
    "CLIPLoader": Definition({}, {"clip_name": STRING, "type": ("wan",), "device": ("default", "cpu")}, ("CLIP",)),
    "VAELoader": Definition({}, {"vae_name": STRING}, ("VAE",)),
    "CLIPVisionLoader": Definition({}, {"clip_name": STRING}, ("CLIP_VISION",)),
    "CLIPVisionEncode": Definition({"clip_vision": "CLIP_VISION", "image": "IMAGE"}, {"crop": ("center", "none")},
                                   ("CLIP_VISION_OUTPUT",)),
    "CLIPTextEncode": Definition({"clip": "CLIP"}, {"text": STRING}, ("CONDITIONING",)),
    "LoraLoaderModelOnly": Definition({"model": "MODEL"}, {"lora_name": STRING, "strength_model": FLOAT}, ("MODEL",)),
    "ModelSamplingSD3": Definition({"model": "MODEL"}, {"shift": FLOAT}, ("MODEL",)),
    "KSampler": Definition(_SAMPLED, {
        "seed": INT, "control_after_generate": _AFTER, "steps": INT, "cfg": FLOAT, "sampler_name": _SAMPLERS,
        "scheduler": ("simple",), "denoise": FLOAT}, ("LATENT",)),
    "KSamplerAdvanced": Definition(_SAMPLED, {
        "add_noise": ("enable", "disable"), "noise_seed": INT, "control_after_generate": _AFTER, "steps": INT,
        "cfg": FLOAT, "sampler_name": _SAMPLERS, "scheduler": ("simple",), "start_at_step": INT, "end_at_step": INT,
        "return_with_leftover_noise": ("disable", "enable")}, ("LATENT",)),
    "EmptyHunyuanLatentVideo": Definition({}, _SIZE, ("LATENT",)),
    "Wan22ImageToVideoLatent": Definition({"vae": "VAE", "start_image": "IMAGE"}, _SIZE, ("LATENT",),
                                          ("start_image",)),
    "WanImageToVideo": _to_video(clip_vision_output="CLIP_VISION_OUTPUT", start_image="IMAGE"),
    "WanFirstLastFrameToVideo": _to_video(
        clip_vision_start_image="CLIP_VISION_OUTPUT", clip_vision_end_image="CLIP_VISION_OUTPUT",
        start_image="IMAGE", end_image="IMAGE"),
    "WanFunControlToVideo": _to_video(clip_vision_output="CLIP_VISION_OUTPUT", start_image="IMAGE",
                                      control_video="IMAGE"),
    "Wan22FunControlToVideo": _to_video(ref_image="IMAGE", control_video="IMAGE"),
    "WanCameraEmbedding": Definition({}, {
        "camera_pose": CAMERA_MOVES, "width": INT, "height": INT, "length": INT, "speed": FLOAT, "fx": FLOAT,
        "fy": FLOAT, "cx": FLOAT, "cy": FLOAT}, ("WAN_CAMERA_EMBEDDING", "INT", "INT", "INT")),
    "WanCameraImageToVideo": _to_video(clip_vision_output="CLIP_VISION_OUTPUT", start_image="IMAGE",
                                       camera_conditions="WAN_CAMERA_EMBEDDING"),
    "ImageScale": Definition({"image": "IMAGE"}, {
        "upscale_method": ("nearest-exact", "bilinear", "area", "bicubic", "lanczos"), "width": INT, "height": INT,
        "crop": ("disabled", "center")}, ("IMAGE",)),
    "VAEEncode": Definition({"pixels": "IMAGE", "vae": "VAE"}, {}, ("LATENT",)),
    "ReferenceLatent": Definition({"conditioning": "CONDITIONING", "latent": "LATENT"}, {}, ("CONDITIONING",),
                                  ("latent",)),
    "WanVaceToVideo": _to_video((*_OUT, "INT"), {"strength": FLOAT}, control_video="IMAGE", control_masks="MASK",
                                reference_image="IMAGE"),
    "WanAnimateToVideo": _to_video(
        (*_OUT, "INT", "INT", "INT"), {"continue_motion_max_frames": INT, "video_frame_offset": INT},
        clip_vision_output="CLIP_VISION_OUTPUT", reference_image="IMAGE", face_video="IMAGE", pose_video="IMAGE",
        background_video="IMAGE", character_mask="MASK", continue_motion="IMAGE"),
    "WanSoundImageToVideo": _to_video(audio_encoder_output="AUDIO_ENCODER_OUTPUT", ref_image="IMAGE",
                                      control_video="IMAGE", ref_motion="IMAGE"),
    "AudioEncoderLoader": Definition({}, {"audio_encoder_name": STRING}, ("AUDIO_ENCODER",)),
    "AudioEncoderEncode": Definition({"audio_encoder": "AUDIO_ENCODER", "audio": "AUDIO"}, {},
                                     ("AUDIO_ENCODER_OUTPUT",)),
    "LoadAudio": Definition({}, {"audio": STRING}, ("AUDIO",)),
    "TrimVideoLatent": Definition({"samples": "LATENT"}, {"trim_amount": INT}, ("LATENT",)),
    "LoadImage": Definition({}, {"image": STRING, "upload": ("image",)}, ("IMAGE", "MASK")),
    "LoadVideo": Definition({}, {"file": STRING, "upload": ("image",)}, ("VIDEO",)),
    "GetVideoComponents": Definition({"video": "VIDEO"}, {}, ("IMAGE", "AUDIO", "FLOAT")),
    "ImageToMask": Definition({"image": "IMAGE"}, {"channel": ("red", "green", "blue", "alpha")}, ("MASK",)),
    "VAEDecode": Definition({"samples": "LATENT", "vae": "VAE"}, {}, ("IMAGE",)),
    "CreateVideo": Definition({"images": "IMAGE", "audio": "AUDIO"}, {"fps": FLOAT}, ("VIDEO",), ("audio",)),
    "SaveVideo": Definition({"video": "VIDEO"}, {"filename_prefix": STRING, "format": ("auto", "mp4"),
                                                 "codec": ("auto", "h264")}, ()),
}


def faults(document: Mapping[str, Any]) -> list[str]:
    """What is not as ComfyUI defines it: nodes, inputs, links with their types, widgets in number, order and kind."""
    nodes, found = {node["id"]: node for node in document["nodes"]}, []
    links = {link[0]: link for link in document["links"]}
    for node in nodes.values():
        definition = NODES.get(node["type"])
        found += [f"there is no node {node['type']}"] if definition is None else _node_faults(node, definition, links)
    for number, source, slot, target, place, type_ in links.values():
        ends = [(source, "outputs", slot), (target, "inputs", place)]
        for node, side, i in ends:
            if node not in nodes or i >= len(nodes[node][side]):
                found.append(f"link {number} has no end at node {node}, {side} {i}")
            elif nodes[node][side][i]["type"] != type_:
                found.append(f"link {number} carries {type_} where node {node} has {nodes[node][side][i]['type']}")
    return found


def _node_faults(node: Mapping[str, Any], definition: Definition, links: Mapping[int, Sequence[Any]]) -> list[str]:
    about, found = f"{node['type']} (node {node['id']})", []
    names = {own["name"]: own for own in node["inputs"]}
    wanted = {**definition.inputs, **{name: own["type"] for name, own in names.items() if name in definition.widgets}}
    if {name: own["type"] for name, own in names.items()} != wanted:
        found.append(f"{about} has the inputs {list(names)} instead of {list(wanted)}")
    found += [f"{about}: {name} is not connected" for name, own in names.items()
              if own["link"] is None and name not in definition.optional]
    found += [f"{about}: {name} has link {own['link']}, which leads elsewhere" for place, (name, own) in enumerate(
        names.items()) if own["link"] is not None and list(links.get(own["link"], ())[3:5]) != [node["id"], place]]
    if tuple(own["type"] for own in node["outputs"]) != definition.outputs:
        found.append(f"{about} does not have the outputs {definition.outputs}")
    values = node["widgets_values"]
    if len(values) != len(definition.widgets):
        found.append(f"{about} has {len(values)} values for {list(definition.widgets)}")
    for (name, kind), value in zip(definition.widgets.items(), values, strict=False):
        if not (value in kind if isinstance(kind, tuple) else type(value) is kind):
            found.append(f"{about}: {name} = {value!r} is not {kind}")
    return found
