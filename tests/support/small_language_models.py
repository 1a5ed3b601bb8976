"""Small random language models of many families, made on the spot."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

VOCABULARY = 400
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
# The configuration's class, without its last word, and what it needs.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "gemma": ("Gemma", GROUPED),
    "gemma2": ("Gemma2", {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", SIZE),
    "phi3": ("Phi3", GROUPED),
    "gpt2": ("GPT2", SIZE),
    "gpt_neox": ("GPTNeoX", SIZE),
    "opt": ("OPT", {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = "the old dog runs over a river, isn't it? Caf\u00e9 \u4e2d\u6771 \U0001f469\u200d\U0001f680 1 2 3\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding on bytes: any character, and most that aren't ASCII take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|start|>"), AddedToken("<|end|>")]}
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(family: str, **config: Any) -> Any:
    """A model whose logits differ much: as initialised all are nearly equal."""
    name, more = FAMILIES[family]
    made = getattr(transformers, f"{name}Config")(**more | config)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.3) if weights.dim() > 1 else weights.add_(torch.randn_like(weights) * 0.1)
    return model.eval()


def save(folder: Path, family: str = "llama", **config: Any) -> str:
    """Write a model and its tokenizer; return where."""
    make_model(family, **config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
