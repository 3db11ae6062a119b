"""A ComfyUI workflow for an exported LoRA: core nodes alone, in the format that ComfyUI opens when a file is dropped.

A graph computes what the sampler's `comfy` profile does (wantrain.models.profiles): tests/unit/test_workflow.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from wantrain.models.comfy_files import AUDIO_FILE, CLIP_VISION_FILE, FILES, TEXT_FILE, VAE_FILES
from wantrain.models.comfy_nodes import CAMERA_MOVES, NODES, faults
from wantrain.models.sampling import Settings
from wantrain.models.task_media import media_of_task
from wantrain.models.variants import Expert, Variant

Loras = Mapping[Expert | None, Sequence[tuple[str, float]]]
"""LoRA file names with their strengths, in the order of loading, of each transformer."""

COLUMN_PX, ROW_PX, WIDTH_PX = 420, 40, 360


@dataclass(frozen=True, slots=True)
class Output:
    """A place that a link comes from."""

    node: int
    slot: int
    type: str


@dataclass
class Graph:
    """Nodes and links in ComfyUI's format; a node is placed to the right of those that it takes from."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    _columns: list[int] = field(default_factory=list)
    _heights: dict[int, int] = field(default_factory=dict)

    def add(self, kind: str, *values: object, **links: Output | None) -> list[Output]:
        """The outputs of a new node: its widgets' values in order, and where its inputs come from."""
        definition, number = NODES[kind], len(self.nodes) + 1
        given = {name: output for name, output in links.items() if output}
        inputs: list[dict[str, Any]] = [{"name": name, "type": type_} for name, type_ in definition.inputs.items()]
        inputs += [{"name": name, "type": given[name].type, "widget": {"name": name}}
                   for name in definition.widgets if name in given]
        for slot, own in enumerate(inputs):
            own["link"] = self._link(given[own["name"]], number, slot) if own["name"] in given else None
        outputs = [{"name": type_, "type": type_, "links": [], "slot_index": i}
                   for i, type_ in enumerate(definition.outputs)]
        self.nodes.append({
            "id": number, "type": kind, **self._place(given, len(inputs) + len(values)), "flags": {},
            "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
            "properties": {"Node name for S&R": kind}, "widgets_values": list(values)})
        return [Output(number, slot, type_) for slot, type_ in enumerate(definition.outputs)]

    def titled(self, title: str, kind: str, *values: object, **links: Output | None) -> list[Output]:
        """A new node with words of our own on it."""
        outputs = self.add(kind, *values, **links)
        self.nodes[-1]["title"] = title
        return outputs

    def _link(self, source: Output, node: int, slot: int) -> int:
        number = len(self.links) + 1
        self.links.append([number, source.node, source.slot, node, slot, source.type])
        self.nodes[source.node - 1]["outputs"][source.slot]["links"].append(number)
        return number

    def _place(self, given: Mapping[str, Output], num_rows: int) -> dict[str, list[int]]:
        column = max((self._columns[source.node - 1] + 1 for source in given.values()), default=0)
        self._columns.append(column)
        top, height = self._heights.get(column, 0), ROW_PX + 26 * max(1, num_rows)
        self._heights[column] = top + height + ROW_PX
        return {"pos": [column * COLUMN_PX, top], "size": [WIDTH_PX, height]}

    def document(self) -> dict[str, Any]:
        """The whole file."""
        return {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
                "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a workflow shall make: the sampler's settings (profile `comfy`), LoRAs, prompt, seed, the files that the
    task works from (as an entry of sampler.inputs), and the name of the videos.
    """

    settings: Settings
    loras: Loras
    prompt: str
    seed: int
    inputs: Mapping[str, str]
    name: str


def workflow(variant: Variant, wanted: Wanted) -> dict[str, Any]:
    """The graph of a variant, from its loaders to the saved video."""
    graph = Graph()
    models = [_model(graph, variant, expert, wanted) for expert in variant.experts or (None,)]
    clip, = graph.add("CLIPLoader", TEXT_FILE, "wan", "default")
    vae, = graph.add("VAELoader", VAE_FILES[variant.vae])
    positive, = graph.titled("Prompt", "CLIPTextEncode", wanted.prompt, clip=clip)
    negative, = graph.titled("Negative prompt", "CLIPTextEncode", wanted.settings.negative_prompt, clip=clip)
    start = _TASKS[variant.task](_Start(graph, variant, wanted, vae, positive, negative))
    latent = _sampled(graph, variant, wanted, models, start)
    if len(start) > 3:  # frames of a reference before the video
        latent, = graph.add("TrimVideoLatent", 0, samples=latent, trim_amount=start[3])
    images, = graph.add("VAEDecode", samples=latent, vae=vae)
    video, = graph.add("CreateVideo", float(variant.fps), images=images)
    graph.add("SaveVideo", f"video/{wanted.name}", "auto", "auto", video=video)
    made = graph.document()
    assert not (wrong := faults(made)), f"the workflow is not one of ComfyUI's: {wrong[0]}"
    return made


def _model(graph: Graph, variant: Variant, expert: Expert | None, wanted: Wanted) -> Output:
    """A transformer with its LoRAs and the timestep shift."""
    about = f", {expert} noise" if expert else ""
    model, = graph.titled(f"Base{about}", "UNETLoader", FILES[variant.name].format(expert), "default")
    for name, strength in wanted.loras.get(expert, ()):
        model, = graph.titled(f"LoRA{about}", "LoraLoaderModelOnly", name, float(strength), model=model)
    model, = graph.add("ModelSamplingSD3", float(wanted.settings.shift), model=model)
    return model


def _sampled(graph: Graph, variant: Variant, wanted: Wanted, models: Sequence[Output], start: Sequence[Output]
             ) -> Output:
    """The denoised latent: of one sampler, or of one for each expert, the second from where the first ends."""
    own = wanted.settings
    (low, high), solver = own.guidance, own.tool_solver.comfy_name
    links = {"positive": start[0], "negative": start[1]}
    if len(models) == 1:
        return graph.add("KSampler", wanted.seed, "fixed", own.num_steps, low, solver, "simple", 1.0, model=models[0],
                         latent_image=start[2], **links)[0]
    change = sum(map(variant.is_high, own.tool_solver.timesteps(own.sigmas[:-1])))
    latent = start[2]
    for model, guidance, is_first in zip(models, (high, low), (True, False), strict=True):
        noise, leftover, (begin, end) = ("enable", "enable", (0, change)) if is_first else (
            "disable", "disable", (change, 10_000))
        latent, = graph.add("KSamplerAdvanced", noise, wanted.seed, "fixed", own.num_steps, guidance, solver, "simple",
                            begin, end, leftover, model=model, latent_image=latent, **links)
    return latent


@dataclass(frozen=True, slots=True)
class _Start:
    """What the node of a task is made from."""

    graph: Graph
    variant: Variant
    wanted: Wanted
    vae: Output
    positive: Output
    negative: Output

    @property
    def size(self) -> tuple[int, int, int, int]:
        bucket = self.wanted.settings.bucket
        return bucket.width, bucket.height, bucket.num_frames, 1

    def has(self, name: str) -> bool:
        """Whether the task is given this: the inputs that are named, or those that it cannot do without."""
        task = media_of_task(self.variant.task)
        named = self.wanted.inputs or task.inputs_needed or task.partners[:1]
        return name in named

    def image(self, name: str) -> Output | None:
        """A picture that ComfyUI's user picks."""
        if not self.has(name):
            return None
        return self.graph.titled(name, "LoadImage", self.file(name, ".png"), "image")[0]

    def frames(self, name: str) -> Output | None:
        """The frames of a video that ComfyUI's user picks."""
        if not self.has(name):
            return None
        video, = self.graph.titled(name, "LoadVideo", self.file(name, ".mp4"), "image")
        return self.graph.add("GetVideoComponents", video=video)[0]

    def mask(self) -> Output | None:
        """What of the video is to be made anew."""
        frames = self.frames("control_mask")
        return self.graph.add("ImageToMask", "red", image=frames)[0] if frames else None

    def seen(self, image: Output | None) -> Output | None:
        """What the CLIP tower sees in a picture, all of it squashed as in training; None where the variant has none."""
        if image is None or not self.variant.architecture.image_dim:
            return None
        tower, = self.graph.add("CLIPVisionLoader", CLIP_VISION_FILE)
        return self.graph.add("CLIPVisionEncode", "none", clip_vision=tower, image=image)[0]

    def node(self, kind: str, *more: object, **links: Output | None) -> list[Output]:
        """A node that takes texts and VAE, and gives texts and latents."""
        return self.graph.add(kind, *self.size, *more, positive=self.positive, negative=self.negative, vae=self.vae,
                              **links)

    def file(self, name: str, suffix: str) -> str:
        """What an input's file is called where the user has named none."""
        return PurePath(self.wanted.inputs.get(name, name + suffix)).name


def _t2v(own: _Start) -> list[Output]:
    return [own.positive, own.negative, *own.graph.add("EmptyHunyuanLatentVideo", *own.size)]


def _i2v(own: _Start) -> list[Output]:
    first = own.image("first")
    return own.node("WanImageToVideo", clip_vision_output=own.seen(first), start_image=first)


def _flf2v(own: _Start) -> list[Output]:
    first, last = own.image("first"), own.image("last")
    return own.node("WanFirstLastFrameToVideo", clip_vision_start_image=own.seen(first),
                    clip_vision_end_image=own.seen(last), start_image=first, end_image=last)


def _ti2v(own: _Start) -> list[Output]:
    latent = own.graph.add("Wan22ImageToVideoLatent", *own.size, vae=own.vae, start_image=own.image("first"))
    return [own.positive, own.negative, *latent]


def _control(own: _Start) -> list[Output]:
    first = own.image("first")
    return own.node("WanFunControlToVideo", clip_vision_output=own.seen(first), start_image=first,
                    control_video=own.frames("control"))


def _control_reference(own: _Start) -> list[Output]:
    """As before, and the reference's latents for both texts; CLIP sees the reference, where there is one."""
    first, reference = own.image("first"), own.image("reference")
    *texts, latent = own.node("WanFunControlToVideo", clip_vision_output=own.seen(reference or first),
                              start_image=first, control_video=own.frames("control"))
    if reference:
        scaled, = own.graph.add("ImageScale", "bicubic", *own.size[:2], "center", image=reference)
        encoded, = own.graph.add("VAEEncode", pixels=scaled, vae=own.vae)
        texts = [own.graph.add("ReferenceLatent", conditioning=text, latent=encoded)[0] for text in texts]
    return [*texts, latent]


def _control_inpaint(own: _Start) -> list[Output]:
    return own.node("Wan22FunControlToVideo", ref_image=own.image("reference"), control_video=own.frames("control"))


def _camera(own: _Start) -> list[Output]:
    """The move is chosen in ComfyUI, which reads no poses."""
    first = own.image("first")
    way = own.graph.titled("camera", "WanCameraEmbedding", CAMERA_MOVES[0], *own.size[:3], 1.0, *[0.5] * 4)[0]
    return own.node("WanCameraImageToVideo", clip_vision_output=own.seen(first), start_image=first,
                    camera_conditions=way)


def _vace(own: _Start) -> list[Output]:
    return own.node("WanVaceToVideo", 1.0, control_video=own.frames("control"), control_masks=own.mask(),
                    reference_image=own.image("reference"))


def _animate(own: _Start) -> list[Output]:
    reference = own.image("reference")
    return own.node("WanAnimateToVideo", 5, 0, clip_vision_output=own.seen(reference), reference_image=reference,
                    face_video=own.frames("face"), pose_video=own.frames("control"),
                    background_video=own.frames("background"), character_mask=own.mask())


def _s2v(own: _Start) -> list[Output]:
    """Its latent has no frame of the reference, of which the sample's first four frames are."""
    width, height, num_frames, batch = own.size
    loader, = own.graph.add("AudioEncoderLoader", AUDIO_FILE)
    sound, = own.graph.titled("audio", "LoadAudio", own.file("audio", ".wav"))
    heard, = own.graph.add("AudioEncoderEncode", audio_encoder=loader, audio=sound)
    return own.graph.add("WanSoundImageToVideo", width, height, max(1, num_frames - 4), batch, positive=own.positive,
                         negative=own.negative, vae=own.vae, audio_encoder_output=heard,
                         ref_image=own.image("reference"), control_video=own.frames("control"))


_TASKS = {"t2v": _t2v, "i2v": _i2v, "flf2v": _flf2v, "ti2v": _ti2v, "control": _control,
          "control_reference": _control_reference, "control_inpaint": _control_inpaint, "camera": _camera,
          "camera_inpaint": _camera, "vace": _vace, "animate": _animate, "s2v": _s2v}
