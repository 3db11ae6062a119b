"""The frozen base: where its parts are, in whatever published layout, and each of them loaded strictly.

Where the parts are and what they hold is told without torch: each method imports the library whose class it fills.
"""

from __future__ import annotations

import difflib
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wantrain.files import digest_path, digest_text
from wantrain.models import hub, names, sizes
from wantrain.models.containers import Container, find_parts, open_container
from wantrain.models.detection import detect, expert_named, part_held, stated_vace_layers
from wantrain.models.lora_names import is_lora, lora_argument, refuse_other_experts_file
from wantrain.models.variants import Expert, Variant, diffusers_config, is_diffusers_config
from wantrain.models.weight_files import ContainerError, parse_json
from wantrain.terms import SOUND_RATE, TEXT_LEN, UserError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import CLIPVisionModel, Wav2Vec2Model

    from wantrain.models.conditioning import Encoders

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny_wan"
TextPipeline: TypeAlias = "WanPipeline"
"""The pipeline of a tokenizer and a text encoder alone."""

_NOT_IN_TRAINING = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
"""What hides parts of the sound while wav2vec2 itself is trained."""

SHARED_PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True, slots=True)
class Base:
    """One checkpoint: the path of each part (file or folder) and its row of the variants table.

    `merges` are LoRA files with strengths, by expert, that the transformer is loaded with, as if its files held them.
    Where there are two transformers the parts are `high` and `low`, and `each` gives the base of each.
    """

    variant: Variant
    parts: Mapping[str, Path]
    merges: Mapping[Expert | None, Sequence[tuple[Path, float]]] = field(default_factory=dict)
    expert: Expert | None = None
    absent: tuple[str, ...] = ()
    """Model ids that are not on this machine yet, whose parts are left out."""

    def each(self) -> list[Base]:
        """This base alone; or one base for each expert, high noise first, whose file is then its part `transformer`."""
        return [replace(self, expert=expert, parts={**self.parts, **(
            {"transformer": self.parts[expert]} if expert in self.parts else {})})
                for expert in self.variant.experts] or [self]

    @property
    def merged(self) -> Sequence[tuple[Path, float]]:
        """The LoRA files that are merged into this expert, with their strengths."""
        return self.merges.get(self.expert, ())

    def digest(self, part: str, memo: Path) -> str:
        """A digest of one part's files, and of what is merged into the transformer."""
        if part not in self.parts:
            return ""  # of a model that is yet to be downloaded: it names no entry of any cache
        own = digest_path(self.parts[part], memo)
        if part != "transformer" or not self.merged:
            return own
        return digest_text(own, *(f"{digest_path(file, memo)} {strength}" for file, strength in self.merged))

    def _transformer_config(self) -> dict[str, Any]:
        path = self.parts["transformer"] / "config.json" if "transformer" in self.parts else None
        own = parse_json(path, path.name, path.read_bytes()) if path and path.is_file() else {}
        if is_diffusers_config(own):
            return own
        stated = stated_vace_layers(own)
        return diffusers_config(self.variant) | ({"vace_layers": list(stated)} if stated else {})

    @property
    def _transformer_class(self) -> Any:
        from wantrain.models.fun import class_of

        return class_of(self.variant)

    def meta_transformer(self) -> WanTransformer3DModel:
        """The transformer's architecture on the meta device, without reading weights."""
        import torch

        with torch.device("meta"):
            return self._transformer_class.from_config(self._transformer_config())

    def refuse_other_parts(self) -> None:
        """Raise ContainerError for a single file, beside the transformer's, whose tensors are those of another part."""
        for part, wanted in {"vae": "VAE", "text_encoder": "umT5 text encoder",
                             "image_encoder": "CLIP image encoder"}.items():
            if part in self.parts and self.parts[part].is_file():
                container = open_container(self.parts[part])
                _refuse_lora(container, wanted)
                if (held := part_held(container.names())) and held != wanted:
                    raise ContainerError(container.path, f"is a {held}, and model.parts.{part} is a {wanted}",
                                         "two paths exchanged")

    def detected(self) -> str:
        """Detect the variant from the transformer's tensors, and say it; raises UserError when it is not `variant`."""
        return self._detected(open_container(self.parts["transformer"]))

    def _detected(self, container: Container) -> str:
        named = expert_named(self.parts["transformer"])
        if self.expert and named not in (None, self.expert):
            raise UserError(f"{self.parts['transformer']} is named as the {named} noise expert, but is "
                            f"given as the {self.expert} one", "exchange model.parts.high and model.parts.low")
        _refuse_lora(container)
        detection = detect(container.shapes(), str(self.parts["transformer"]), container.config)
        detection.resolve(self.variant.name)
        kinds = sorted({container.dtype_of(name) for name in container.names()})
        return f"{detection.message}; {container.kind}, {detection.layout} names, {', '.join(kinds)}"

    def transformer(self, dtype: torch.dtype, device: torch.device,
                    placed: Callable[[torch.nn.Parameter], None] | None = None, form: str = "", *,
                    mapped: bool = False) -> WanTransformer3DModel:
        """The transformer in `dtype` (time embedding, norms and modulation tables in float32), frozen, eval mode. With
        a `form` (wantrain.models.quantised.LARGEST) the Linears of its blocks are stored in that, and products are
        computed in it where the device can.

        `placed` gets each parameter as soon as it is there (wantrain.models.loading.load_into). `mapped`: what the file
        stores in the dtype that it has here stays in the file, which is mapped.
        """
        from wantrain.models.loading import empty_weights, load_into
        from wantrain.models.quantised import quantise

        container = replace(open_container(self.parts["transformer"]), is_mapped=mapped)
        self._detected(container)
        with empty_weights():
            module = self._transformer_class.from_config(self._transformer_config())
            quantise(module, form, may_use_bytes=True)
        load_into(module, container, names.transformer_rename(container.names()), dtype=dtype, device=device,
                  keep_float32=self._transformer_class._keep_in_fp32_modules, edit=self._merging(container),
                  placed=placed)
        return module.requires_grad_(False).eval().to(device)

    def stored_form(self) -> str | None:
        """The form in which the transformer's file holds most of its matrices already, a word of memory.base; None
        where that is none of these, or the file is not here.
        """
        if "transformer" not in self.parts:
            return None
        container = open_container(self.parts["transformer"])
        found = Counter(container.form_of(name) for name, shape in container.shapes().items() if len(shape) == 2)
        return max(found, key=lambda form: found[form])

    def _merging(self, container: Container) -> Callable[[str, torch.Tensor], torch.Tensor] | None:
        """What folds the merged LoRAs into the container's tensors as they are read."""
        if not self.merged:
            return None
        from wantrain.models.lora_updates import merged_tensor, plan_merge, read_given

        loras = [(read_given(file, self.expert), strength) for file, strength in self.merged]
        return partial(merged_tensor, plan_merge(container, loras))

    def vae(self, device: torch.device, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
        """The VAE, frozen; in float32, as the official code runs it, unless told."""
        import torch
        from diffusers import AutoencoderKLWan

        from wantrain.models.loading import empty_weights, load_into

        container = open_container(self.parts["vae"])
        with empty_weights():
            module = AutoencoderKLWan.from_config(container.config or sizes.VAES[names.vae_version(container.names())])
        wanted = self.variant.architecture.out_channels
        if module.config.z_dim != wanted:
            raise ContainerError(container.path, f"makes latents of {module.config.z_dim} channels, "
                                 f"{self.variant.name} takes {wanted}", "the VAE of the other generation",
                                 f"set model.parts.vae to Wan{self.variant.vae}_VAE.pth or its like")
        load_into(module, container, names.vae_rename(container.names()), dtype=dtype or torch.float32,
                  device=device)
        return module.requires_grad_(False).eval().to(device)

    def text(self, dtype: torch.dtype, device: torch.device, form: str = "") -> TextPipeline:
        """Tokenizer and umT5 encoder, frozen, as a pipeline without the other parts: its prompt code is the reference.
        With a `form` the Linears of the encoder's blocks are stored in that; it multiplies by what they stand for.
        """
        from diffusers import WanPipeline
        from transformers import UMT5Config, UMT5EncoderModel

        from wantrain.models.loading import empty_weights, load_into
        from wantrain.models.quantised import quantise

        container = open_container(self.parts["text_encoder"])
        with empty_weights():
            module = UMT5EncoderModel(UMT5Config(**(container.config or sizes.UMT5_XXL)))
            quantise(module, form)
        load_into(module, container, names.t5_rename(container.names()), dtype=dtype, device=device)
        module = module.requires_grad_(False).eval().to(device)
        return WanPipeline(tokenizer=self.tokenizer(), text_encoder=module, transformer=None, vae=None, scheduler=None)

    def tokenizer(self) -> Any:
        """The umT5 tokenizer by itself."""
        from transformers import AutoTokenizer, T5Tokenizer

        path = self.parts["tokenizer"]
        if path.is_dir():
            return AutoTokenizer.from_pretrained(path)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "spiece.model").write_bytes(open_container(path).spiece_model() or b"")
            return T5Tokenizer.from_pretrained(folder, model_max_length=TEXT_LEN)

    def image_encoder(self, dtype: torch.dtype, device: torch.device, form: str = "") -> CLIPVisionModel:
        """The CLIP vision tower of the 2.1 image-to-video checkpoints, frozen; `form` as for `text`."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        from wantrain.models.loading import empty_weights, load_into
        from wantrain.models.quantised import quantise

        container = open_container(self.parts["image_encoder"])
        with empty_weights():
            module = CLIPVisionModel(CLIPVisionConfig(**(container.config or sizes.CLIP_VIT_H)))
            quantise(module, form)
        load_into(module, container, names.clip_rename(container.names()), dtype=dtype, device=device)
        return module.requires_grad_(False).eval().to(device)

    def audio_encoder(self, device: torch.device) -> Wav2Vec2Model:
        """The wav2vec2 that S2V hears with, frozen, in float32."""
        import torch
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        from wantrain.models.loading import empty_weights, load_into

        own, path = self.variant.architecture.speech, self.parts["audio_encoder"]
        assert own is not None, "of S2V alone"
        container = open_container(path)
        config = Wav2Vec2Config(**{**(container.config or sizes.WAV2VEC2_XLSR), **_NOT_IN_TRAINING})
        about = path / "preprocessor_config.json"
        rate = parse_json(about, about.name, about.read_bytes()).get("sampling_rate") if about.is_file() else SOUND_RATE
        found, wanted = (config.hidden_size, config.num_hidden_layers + 1), (own.audio_dim, own.audio_states)
        if found != wanted or rate != SOUND_RATE:
            raise ContainerError(path, f"gives {found[1]} hidden states of {found[0]} numbers at {rate} Hz, "
                                 f"{self.variant.name} takes {wanted[1]} of {wanted[0]} at {SOUND_RATE} Hz",
                                 "another wav2vec2", "set model.parts.audio_encoder to the folder "
                                 "wav2vec2-large-xlsr-53-english that came with the checkpoint")
        with empty_weights():
            module = Wav2Vec2Model(config)
        load_into(module, container, names.wav2vec2_rename(container.names()), dtype=torch.float32, device=device)
        return module.requires_grad_(False).eval().to(device)

    def encoders(self, device: torch.device, vae_dtype: torch.dtype | None = None, form: str = "",
                 gib: float | None = None) -> Encoders:
        """The VAE, and CLIP tower or wav2vec2 where the variant has it; `form` as for `text`, `gib` as for Encoders."""
        import torch

        from wantrain.models.conditioning import Encoders

        more = encoder_parts(self.variant)
        image = self.image_encoder(torch.float32, device, form) if "image_encoder" in more else None
        audio = self.audio_encoder(device) if "audio_encoder" in more else None
        return Encoders(self.vae(device, vae_dtype), image, gib, audio)


def encoder_parts(variant: Variant) -> tuple[str, ...]:
    """The parts that make of a clip's media, besides the VAE, what its task needs."""
    own = variant.architecture
    return ("image_encoder",) * bool(own.image_dim) + ("audio_encoder",) * bool(own.speech)


def required_parts(variant: Variant) -> tuple[str, ...]:
    """The parts that a whole checkpoint must have."""
    return (*(variant.experts or ("transformer",)), *SHARED_PARTS, *encoder_parts(variant))


def expert_path(name: str, expert: Expert | None) -> str:
    """The name, with high or low put in place of `{expert}`."""
    return name.replace("{expert}", expert) if expert else name


def find(variant: Variant, path: str | None, parts: Mapping[str, str], merge: Sequence[str] = (), fetch: bool = True
         ) -> Base:
    """Where everything is: the parts of the folder `path` (`embedded` for the tiny base; diffusers or official
    layout), with single files or folders in their place where `parts` names them.

    Each may be a model id (wantrain.models.hub); without `fetch` none is downloaded, and those that are not here are
    `absent`. `merge`: LoRA files as FILE or FILE=STRENGTH; `{expert}` in a name stands for high or low.
    """
    required = required_parts(variant)
    if unknown := sorted(set(parts) - set(required)):
        key = f"model.parts.{(difflib.get_close_matches(unknown[0], required, 1) or required)[0]}"
        raise UserError(f"unknown config key model.parts.{unknown[0]}; there are {', '.join(required)}",
                        shlex.quote(f"{key}={parts[unknown[0]]}"))
    found: dict[str, Path] = {}
    absent: dict[str, set[str]] = {}
    if path:
        wanted = set(required) - set(parts)
        folder = EMBEDDED if path == "embedded" else _at("model.path", path, fetch, lambda f: _is_whole(f, wanted))
        if folder is None:
            absent[path] = wanted
        else:
            found = find_parts(folder) if folder.is_dir() else {"transformer": folder}
    for part, where in parts.items():
        if file := _at(f"model.parts.{part}", where, fetch):
            found[part] = file
        else:
            absent.setdefault(where, set()).add(part)
    if "tokenizer" not in found and "text_encoder" in found and found["text_encoder"].is_file() \
            and open_container(found["text_encoder"]).spiece_model():
        found["tokenizer"] = found["text_encoder"]
    for part in [part for part in required if part not in set(found).union(*absent.values())]:
        like = {"tokenizer": "google/umt5-xxl"}.get(part, "FILE_OR_FOLDER")
        raise UserError(f"model.path = {path} holds no {part}, and model.parts.{part} is not set",
                        f"set model.parts.{part}={like}, or model.path to a whole checkpoint, e.g. "
                        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    return Base(variant, {part: found[part] for part in required if part in found}, _merges(variant, merge),
                absent=tuple(absent))


def _merges(variant: Variant, merge: Sequence[str]) -> dict[Expert | None, list[tuple[Path, float]]]:
    """The LoRA files of each expert with their strengths. Raises UserError for one that says it is the other's."""
    merges = {expert: [lora_argument(expert_path(argument, expert)) for argument in merge]
              for expert in variant.experts or (None,)}
    for expert, loras in merges.items():
        for file, _ in loras:
            refuse_other_experts_file(file, expert)
    return dict(merges)


def _at(key: str, where: str, fetch: bool, whole: Callable[[Path], bool] | None = None) -> Path | None:
    """The local path of what a key names; None for a model id that is not here and is not to be fetched."""
    try:
        return hub.local(where, whole) if fetch else hub.here(where, whole)
    except UserError as error:
        raise UserError(f"{key}: {error.message}", error.next_step) from error


def _is_whole(folder: Path, wanted: Collection[str]) -> bool:
    """Whether a checkpoint's folder has every part that is wanted."""
    try:
        return set(wanted) <= find_parts(folder).keys()
    except ContainerError:
        return False


def _refuse_lora(container: Container, wanted: str = "transformer") -> None:
    """Raise ContainerError for a LoRA, or a checkpoint of its training, in place of a part of the base."""
    if is_lora(container.names()):
        raise ContainerError(container.path, f"is a LoRA, and a {wanted} is asked for", "two paths exchanged",
                             f"wantrain inspect {shlex.quote(str(container.path))}")


def open_transformer(where: str) -> Container:
    """The transformer of a file, of a folder with its shards, or of a whole checkpoint's folder; or a model id's.

    Raises UserError where there are two, or where the tensors are no Wan transformer's.
    """
    path = hub.local(where)
    if not (path.is_file() or any(path.glob("diffusion_pytorch_model*"))):
        parts = find_parts(path)
        if "transformer" not in parts:
            raise UserError(f"{path} holds two transformers, {parts['high'].name} and {parts['low'].name}",
                            f"say which: {parts['high']}")
        path = parts["transformer"]
    container = open_container(path)
    _refuse_lora(container)
    try:
        names.official_names(container.names())
    except names.UnknownName as error:
        raise ContainerError(path, f"{error}", "a VAE, a text encoder or another model", "name the transformer's file: "
                             f"wantrain inspect {shlex.quote(str(path))}") from error
    return container
