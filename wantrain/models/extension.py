"""Short prompts into long ones, such as Wan was trained with, by a causal language model of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wantrain.terms import UserError

SYSTEM = """You help people who make videos from text. You are given a short description of a video. Write it again as
one paragraph of 60 to 100 English words. Keep each subject, action, number and quoted word of it. Add what a viewer
would see besides: the light, the colours, the surroundings, how things move and what the camera does. Contradict
nothing of the description, and do not speak of sound or of the viewer. Answer with the paragraph alone."""

MOST_TOKENS = 256
"""Of an answer: half of what the text encoder reads."""


@torch.no_grad()
def extended(folder: Path, prompts: Sequence[str], device: torch.device) -> list[str]:
    """Each prompt as the model tells it in more words, always the likeliest ones.

    UserError where it cannot chat, or says nothing.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise UserError(f"sampler.extend_prompts = {folder} has no chat template", "give a model that was trained to "
                        "answer, such as one of Qwen's with Instruct in its name")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).to(device).eval()
    found = []
    for prompt in prompts:
        asked = tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}], add_generation_prompt=True,
            enable_thinking=False, return_tensors="pt", return_dict=True).to(device)
        told = model.generate(**asked, do_sample=False, max_new_tokens=MOST_TOKENS)[0, asked["input_ids"].shape[1]:]
        text = " ".join(tokenizer.decode(told, skip_special_tokens=True).split())
        if not text:
            raise UserError(f"sampler.extend_prompts = {folder} says nothing to the prompt {prompt!r}",
                            "sampler.extend_prompts=null, or another model")
        found.append(text)
    return found
