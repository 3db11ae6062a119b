"""A model that says what it sees of a clip, and what becomes of its words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.command import check_openable
from data_tools.faults import UNREADABLE, fault_of
from data_tools.rows import has
from wantrain.data.media import probe
from wantrain.terms import IMAGE_SUFFIXES, Bucket, UserError

MODEL = "Qwen/Qwen3-VL-8B-Instruct"

LONGEST_ASPECT = 100

OPENING = re.compile(
    r"(?:(?:sure|certainly|of course)[!,.:]|here(?: i|.)s [^:.]{,60}:|(?:caption|description|answer) ?:"
    r"|in th(?:is|e) (?:short )?(?:video|clip|image|picture|photo|scene|footage)(?: clip)?(?:,| we (?:can )?see) "
    r"|th(?:is|e) (?:short )?(?:video|clip|image|picture|photo|footage|caption)(?: clip)? (?:clearly )?"
    r"(?:shows|depicts|features|captures|presents|displays|portrays|(?:opens|begins|starts) (?:with|on)) )\s*", re.I)

REFUSAL = re.compile(r"(i(.m| am) (very )?sorry|sorry,|i can(.?t|not)|i(.m| am) (unable|not able)|as an ai)\b", re.I)

LOOP = re.compile(r"(.{4,200}?)\1{3,}", re.S)

QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a clip gets its caption. `prompt` may hold {medium} and {trigger}, `form` {trigger} and {caption}."""

    source: str
    model: str
    dtype: str
    prompt: str
    trigger: str
    form: str
    num_frames: int
    max_pixels: int
    max_tokens: int
    batch_size: int
    overwrite: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A span of a file, in seconds, of which at most `num_frames` frames are seen with at most `max_pixels` each.

    Without `is_read` only their times and size are found out.
    """

    path: Path
    start_s: float
    end_s: float
    num_frames: int
    max_pixels: int
    is_read: bool = True


@dataclass(frozen=True, slots=True)
class Seen:
    """Frames of one clip and their times in seconds of the source; where there are none, `fault` says why.

    `shape_FHW` is known without reading; `frames_FHWC` uint8 is None then.
    """

    times_s: tuple[float, ...] = ()
    shape_FHW: tuple[int, int, int] = (0, 0, 0)
    frames_FHWC: np.ndarray | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one clip, and whether it came to an end; or why it was not asked."""

    text: str = ""
    is_finished: bool = True
    fault: str = ""


def see(job: Job) -> Seen:
    """Read the frames of one span. For a bad file `fault` says what is wrong; nothing is raised."""
    try:
        check_openable(job.path)
        return _see(job)
    except UNREADABLE as error:
        return Seen(fault=fault_of(job.path, error))


def _see(job: Job) -> Seen:
    """Frames on screen in the middle of equal parts of the span: its first and last, where cuts and fades are, count
    no more than others. A span of few frames shows each once.
    """
    found = probe(job.path)
    if max(found.aspect, 1 / found.aspect) > LONGEST_ASPECT:
        raise ValueError(f"a strip of {found.width}x{found.height} px")
    start_s, fps, number = job.start_s, 1.0, 1
    if found.duration_s > 0:
        end_s = min(job.end_s, found.duration_s)
        if start_s >= end_s:
            raise ValueError(f"the span begins at {start_s:g} s, the film ends at {found.duration_s:g} s")
        later = (found.times_s > start_s + 1e-3) & (found.times_s < end_s - 1e-3)
        number = min(job.num_frames, 1 + int(later.sum()))
        fps = number / (end_s - start_s)
        start_s += 0.5 / fps
    from wantrain.data import decode

    scale = min(1.0, math.sqrt(job.max_pixels / (found.width * found.height)))
    bucket = Bucket(number, max(1, round(found.height * scale)), max(1, round(found.width * scale)))
    times_s = found.times_s[decode.choose_frames(found.times_s, start_s, fps, number)]
    seen = Seen(tuple(map(float, times_s)), (number, bucket.height, bucket.width))
    if not job.is_read:
        return seen
    frames_FCHW = decode.read_clip(job.path, start_s, job.end_s, fps, bucket)
    return dataclasses.replace(seen, frames_FHWC=frames_FCHW.movedim(1, -1).numpy())


class Captioner:
    """A vision-language model from a folder or hub id. Raises UserError where it cannot be loaded.

    Without weights it tells what it would be asked.
    """

    def __init__(self, where: str, settings: Settings, with_weights: bool = True) -> None:
        import torch
        from safetensors import SafetensorError

        self.settings = settings
        try:
            self.processor = _load_processor(where)
            if with_weights:
                self.model = _load_model(where, settings.dtype).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            step = ("take a smaller model or --dtype 4bit" if isinstance(error, torch.OutOfMemoryError) else
                    f"give the folder or id of a model for images and text, such as {MODEL}")
            raise UserError(f"--model {settings.model} cannot be loaded: {str(error).strip().partition(chr(10))[0]}",
                            step) from error

    def prompt(self, job: Job, seen: Seen) -> str:
        """What the model is asked, in its own form; a mark stands where each frame comes."""
        content: list[dict[str, str]] = []
        for time_s in seen.times_s:
            if not is_image(job):
                content.append({"type": "text", "text": f"{max(0.0, time_s - job.start_s):.1f} s:"})
            content.append({"type": "image"})
        content.append({"type": "text", "text": worded(self.settings, job)})
        template = self.processor.chat_template
        quiet = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        text: str = self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                       add_generation_prompt=True, **quiet)
        return text

    def tokenized(self, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> Any:
        """The model's inputs for prompts and their frames_FHWC, padded on the left so that answers begin together."""
        from PIL import Image

        images = [[Image.fromarray(frame_HWC) for frame_HWC in frames_FHWC] for frames_FHWC in pictures]
        return self.processor(text=list(prompts), images=images, padding=True, return_tensors="pt")

    def ask(self, jobs: Sequence[Job], seen: Sequence[Seen]) -> list[Answer]:
        """One answer a clip, always the most likely words."""
        import torch

        prompts = [self.prompt(job, s) for job, s in zip(jobs, seen, strict=True)]
        inputs = self.tokenized(prompts, [s.frames_FHWC for s in seen if s.frames_FHWC is not None])
        try:
            with torch.inference_mode():
                out_BL = self.model.generate(**inputs.to(self.model.device), do_sample=False, num_beams=1,
                                             max_new_tokens=self.settings.max_tokens)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch-size {self.settings.batch_size}: {str(error).splitlines()[0]}",
                            "a smaller --batch-size, --frames or --max-pixels; what was captioned is kept") from error
        out_BL = out_BL[:, inputs["input_ids"].shape[1]:].cpu()
        ends = torch.as_tensor(self.model.generation_config.eos_token_id or self.processor.tokenizer.eos_token_id)
        texts = self.processor.batch_decode(out_BL, skip_special_tokens=True)
        # A template that opens the thinking itself leaves only its end in the answer.
        opened = ["<think>" if p.rstrip().endswith("<think>") else "" for p in prompts]
        return [Answer(start + text, bool(torch.isin(out_L, ends.reshape(-1)).any()))
                for start, text, out_L in zip(opened, texts, out_BL, strict=True)]


def _load_processor(where: str) -> Any:
    """The model's processor without its part for videos, which transformers refuses to load without torchvision."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = type(AutoConfig.from_pretrained(where, trust_remote_code=False))
    if config not in PROCESSOR_MAPPING:
        raise ValueError(f"{config.__name__} is of no model for images and text")
    whole: Any = PROCESSOR_MAPPING[config]
    attributes = [name for name in whole.get_attributes() if name != "video_processor"]
    still: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: attributes)})
    processor = still.from_pretrained(where)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    processor.tokenizer.padding_side = "left"
    return processor


def _load_model(where: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                   bnb_4bit_compute_dtype=torch.bfloat16) if dtype == "4bit" else None
    model, info = AutoModelForImageTextToText.from_pretrained(
        where, dtype=torch.float32 if dtype == "float32" else torch.bfloat16, device_map=device,
        quantization_config=quantized, output_loading_info=True, trust_remote_code=False)
    if info["missing_keys"]:
        raise ValueError(f"{len(info['missing_keys'])} weights are missing, such as {min(info['missing_keys'])}")
    return model


def worded(settings: Settings, job: Job) -> str:
    """The prompt for this clip: the user's own, else the one of its kind of caption."""
    medium = "picture" if is_image(job) else "video"
    return settings.prompt.replace("{medium}", medium).replace("{trigger}", settings.trigger)


def is_image(job: Job) -> bool:
    return job.path.suffix.lower() in IMAGE_SUFFIXES


def clean(text: str) -> str:
    """The caption in an answer, on one line: without thoughts, marks of layout, quotes around it and openings that say
    it is a video.
    """
    text = re.sub(r"<think>.*?(</think>|$)|^.*</think>", " ", text, flags=re.S)
    text = " ".join(re.sub(r"\*\*|^\s*(?:[#>*-]+\s+)", " ", text, flags=re.M).split())
    before = None
    while text != before:
        before = text
        if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & {*text[1:-1]}:
            text = text[1:-1].strip()
        text = OPENING.sub("", text, count=1) if OPENING.match(text) else text
    return text[:1].upper() + text[1:]


def judge(said: Answer, max_tokens: int) -> tuple[str, str]:
    """(caption, ''), or ('', why the answer is no caption).

    An answer that was cut off is kept up to its last whole sentence.
    """
    text = clean(said.text)
    if said.fault:
        return "", said.fault
    sentences = re.split(r"(?<=[.!?\u3002])\s+", text.lower())
    if LOOP.search(text) or any(len(sentence) > 8 and sentences.count(sentence) > 2 for sentence in sentences):
        return "", f"the model repeats itself: ...{text[-60:]!r}"
    if not said.is_finished:
        text = text[: max((end.end() for end in re.finditer(r"[.!?\u3002](?=\s|$)", text)), default=0)]
    if REFUSAL.match(text):
        return "", f"the model refuses: {text[:80]!r}"
    if any(c.isalnum() for c in text):
        return text, ""
    return "", "the model says nothing" if said.is_finished else (
        f"the model came to no end of a sentence in {max_tokens} tokens: allow more with --max-tokens")


def with_trigger(text: str, trigger: str, form: str) -> str:
    """The caption in its form; one that has the trigger as a word of its own already stays as it is."""
    return text if not trigger or has(trigger, text) else form.replace("{trigger}", trigger).replace("{caption}", text)
