"""Prompts in more words: by a tiny random Qwen2, whose likeliest tokens are found here one by one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from wantrain.models import extension
from wantrain.recipe import extending

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    """A folder in transformers' layout, of a model that answers with 12 tokens."""
    monkeypatch.setattr(extension, "MOST_TOKENS", 12)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator([extension.SYSTEM], trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=CHAT)
    fast.save_pretrained(tmp_path / "qwen")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, pad_token_id=0,
                                 initializer_range=0.5)).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


@torch.no_grad()
def likeliest(folder, prompt):
    """The model's answer, a token after the other."""
    fast = AutoTokenizer.from_pretrained(folder)
    ids = fast(f"<system>{extension.SYSTEM}<user>{prompt}<assistant>", return_tensors="pt").input_ids
    model, start = AutoModelForCausalLM.from_pretrained(folder), ids.shape[1]
    while ids.shape[1] < start + 12 and ids[0, -1] != fast.eos_token_id:
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return " ".join(fast.decode(ids[0, start:], skip_special_tokens=True).split())


def test_prompts_are_extended_kept_and_sampled_again_without_the_model(wantrain, qwen, tmp_path, monkeypatch, capsys):
    own = (f"sampler.extend_prompts={qwen}", "sampler.prompts=['sqstyle, a square', a circle]", "sampler.strengths=[0]")
    assert wantrain("sample", *own) == 0
    samples = tmp_path / "run" / "samples"
    answers = [likeliest(qwen, prompt) for prompt in ("a square", "a circle")]
    assert answers[0] != answers[1]
    sampled = [json.loads((samples / f"00{row}_base.json").read_text())["prompt"] for row in (0, 1)]
    assert sampled == [f"sqstyle, {answers[0]}", answers[1]]
    shown = json.loads((samples / "results.json").read_text())
    assert [prompt["text"] for prompt in shown["prompts"]] == ["sqstyle, a square", "a circle"]
    assert [video["caption"] for video in shown["videos"]] == sampled
    monkeypatch.setattr(extending.extension, "extended", None)  # what was said is not asked for again
    assert wantrain("sample", *own) == 0
    assert "2 of 2 videos" in capsys.readouterr().out
    shutil.rmtree(qwen)
    assert wantrain("sample", "--like", str(samples / "000_base.mp4"), base=[]) == 0
    assert "the same frames as" in capsys.readouterr().out


def test_a_model_that_cannot_chat_is_refused(wantrain, qwen, capsys):
    (qwen / "chat_template.jinja").unlink()
    assert wantrain("sample", f"sampler.extend_prompts={qwen}", "sampler.strengths=[0]") == 2
    assert "has no chat template" in capsys.readouterr().err
