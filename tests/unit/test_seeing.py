"""Who looks at videos: the tiny base's probe on clips whose captions are known, CLIP beside transformers' forward."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from wantrain import config
from wantrain.data import decode, manifest
from wantrain.models.seeing import CLIP_MEAN, CLIP_STD, ClipSeer, TinySeer
from wantrain.terms import Bucket, UserError


def clips_of(folder, number=8):
    found = manifest.read(manifest.ClipSource("s", str(config.asset(folder))))[:number]
    return [(clip.caption, decode.read_clip(clip.path, 0, None, 16, Bucket(9, 64, 96))) for clip in found]


@pytest.fixture(scope="module")
def tiny():
    return TinySeer()


def test_the_probe_knows_a_clip_by_its_caption(tiny):
    for folder, least in (("demo/anime/regularisation", 0.85), ("demo/anime/heldout", 0.85)):
        clips = clips_of(folder)
        own = [tiny.adherence(caption, frames) for caption, frames in clips]
        others = [tiny.adherence(caption, frames) for (caption, _), (_, frames) in zip(clips, clips[1:] + clips[:1],
                                                                                      strict=True)]
        assert sum(own) / len(own) > least, folder
        assert sum(others) / len(others) < 0.4, folder
    assert tiny.adherence("a bowl of oranges", clips[0][1]) is None


def test_features_of_a_video_are_its_own_and_of_length_one(tiny):
    (_, one), (_, other), *_ = clips_of("demo/anime")
    assert tiny.features(one).norm() == pytest.approx(1)
    assert tiny.features(one) @ tiny.features(one.flip(0)) == pytest.approx(1)
    assert tiny.features(one) @ tiny.features(other) < 0.95


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights, whose tokenizer knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(
        text_config={**towers, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0,
                     "eos_token_id": 1, "projection_dim": 24},
        vision_config={**towers, "image_size": 32, "patch_size": 8, "projection_dim": 24}, projection_dim=24,
    )).save_pretrained(folder)
    return folder


def test_clip_is_asked_as_transformers_own_forward_asks_it(clip_folder):
    """A still of CLIP's own size: its one picture, normalised, beside the prompt."""
    picture = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    model, tokens = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizerFast.from_pretrained(clip_folder)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        said = model(pixel_values=(picture / 255 - mean) / std, **tokens("a red house", return_tensors="pt"))
    seer = ClipSeer(clip_folder)
    torch.testing.assert_close(seer.features(picture), said.image_embeds[0], rtol=1e-4, atol=1e-5)
    assert seer.adherence("a red house", picture) == pytest.approx(float(
        said.text_embeds[0] @ said.image_embeds[0]), abs=1e-5)
    assert seer.adherence("a red house " * 40, picture.expand(9, -1, -1, -1)) is not None


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.encoder"):
        ClipSeer(tmp_path)
