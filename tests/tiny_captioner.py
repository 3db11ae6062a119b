"""A tiny random model of images and text in the hub's layout, which says one sentence."""

import json

import torch

SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")
WORDS = ("The video shows", " a red", " ball", " that rolls", " away", ".", " Then", "<think>", "</think>")
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}
{{- c['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SENTENCE = ("The video shows", " a red", " ball", " that rolls", " away", ".", "<|im_end|>")
SAID = "A red ball that rolls away."


def new_tokenizer():
    """Bytes, whole words and the marks of Qwen's chats."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[1])
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    return fast


def write_model(folder, sentence=SENTENCE, family="qwen3_vl"):
    """A tiny random Qwen-VL in the hub's layout of files, whose next word hangs on its last one alone."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = new_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*WORDS, *SPECIAL)}
    width = -len(tokenizer) // 8 * -8
    patch = 16 if family == "qwen3_vl" else 14
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
              "patch_size": patch}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]} if family == "qwen3_vl" else {}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    config = AutoConfig.for_model(
        family, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        text_config={"vocab_size": width, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": width // 8, "num_key_value_heads": 1, "head_dim": 8,
                     "rope_parameters": rope})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    text = model.model.language_model
    with torch.no_grad():
        text.embed_tokens.weight.copy_(torch.eye(width))
        text.layers[0].self_attn.o_proj.weight.zero_()
        text.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for last, following in zip([tokenizer.encode("\n")[-1], *(ids[w] for w in sentence)], sentence, strict=False):
            model.lm_head.weight[ids[following], last] = 0.3  # likely, and far from certain
    model.generation_config.update(do_sample=True, temperature=0.9, top_k=20, pad_token_id=ids["<|endoftext|>"],
                                   eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 1024, "longest_edge": 16777216}, "patch_size": patch, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast"}))
    return folder
