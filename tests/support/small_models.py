"""Small random models of every family, made on the spot: folders as `save_pretrained` writes them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)  # beside other tests' processes two that wait for each other are slower than one

SPACED = "the of old dog runs isn't quickly , . unbelievable caf\u00e9 \u4e2d river ! 42 'tis over it's"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
EDGES = {"cls_token_id": 0, "bos_token_id": 0, "sep_token_id": 2, "eos_token_id": 2}
LIKE_ROBERTA: dict[str, Any] = {"max_position_embeddings": 514, "type_vocab_size": 1, **EDGES}
TWO_TYPES = {"type_vocab_size": 2}  # as the tokenizer gives
LIKE_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4}
# The configuration's class, without its last word, and what it needs besides SIZE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "roberta": ("Roberta", {"max_position_embeddings": 514, "type_vocab_size": 1, **EDGES}),
    "xlm-roberta": ("XLMRoberta", {"max_position_embeddings": 514, "type_vocab_size": 1, **EDGES}),
    "mpnet": ("MPNet", {"max_position_embeddings": 514, **EDGES}),
    "electra": ("Electra", {"embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "modernbert": ("ModernBert", {"local_attention": 16, **EDGES}),
    "albert": ("Albert", {"embedding_size": 16}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}
# All other encoders of Transformers that can be made small and take texts alone.
ARCHITECTURES = FAMILIES | {
    "big_bird": ("BigBird", {}),
    "camembert": ("Camembert", LIKE_ROBERTA),
    "canine": ("Canine", {"num_hash_buckets": 512, "local_transformer_stride": 16}),
    "convbert": ("ConvBert", {"embedding_size": 16}),
    "data2vec-text": ("Data2VecText", LIKE_ROBERTA),
    "deberta": ("Deberta", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ernie": ("Ernie", {"use_task_id": True}),
    "esm": ("Esm", {"position_embedding_type": "rotary", "max_position_embeddings": 514}),
    "eurobert": ("EuroBert", {"max_position_embeddings": 512, "mask_token_id": 4, **EDGES}),
    "flaubert": ("Flaubert", LIKE_XLM),
    "fnet": ("FNet", {}),
    "funnel": ("Funnel", {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}),
    "gte": ("Gte", TWO_TYPES),
    "ibert": ("IBert", LIKE_ROBERTA),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", TWO_TYPES),
    "layoutlm": ("LayoutLM", {}),
    "layoutlmv3": (
        "LayoutLMv3",
        LIKE_ROBERTA | {"coordinate_size": 6, "shape_size": 4, "visual_embed": False},
    ),
    "longformer": ("Longformer", LIKE_ROBERTA | {"attention_window": 16}),
    "luke": ("Luke", LIKE_ROBERTA | {"entity_vocab_size": 8, "entity_emb_size": 8}),
    "markuplm": ("MarkupLM", LIKE_ROBERTA),
    "megatron-bert": ("MegatronBert", {}),
    "mobilebert": ("MobileBert", {"embedding_size": 16, "intra_bottleneck_size": 16}),
    "mra": ("Mra", TWO_TYPES),
    "nomic_bert": ("NomicBert", {}),
    "nystromformer": ("Nystromformer", {"max_position_embeddings": 510}),
    "perceiver": (
        "Perceiver",
        {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 2},
    ),
    "reformer": (
        "Reformer",
        {"attention_head_size": 8, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    ),
    "rembert": ("RemBert", {"input_embedding_size": 16, "output_embedding_size": 16, **EDGES}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", LIKE_ROBERTA),
    "roc_bert": ("RoCBert", {"pronunciation_vocab_size": 200, "shape_vocab_size": 200}),
    "roformer": ("RoFormer", {"embedding_size": 16, "max_position_embeddings": 512}),
    "squeezebert": ("SqueezeBert", {"embedding_size": 32}),
    "xlm": ("XLM", LIKE_XLM),
    "xlm-roberta-xl": ("XLMRobertaXL", LIKE_ROBERTA),
    "xlnet": ("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "xmod": ("Xmod", LIKE_ROBERTA | {"languages": ["en_XX"], "default_language": "en_XX"}),
    "yoso": ("Yoso", TWO_TYPES),
}
# How a batch of their texts is computed on a CPU, as the probe at load finds it; all others: padded.
PADDING_FREE = {
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "electra",
    "camembert",
    "data2vec-text",
}
EQUAL_LENGTHS = {"canine", "convbert", "fnet", "mobilebert", "nystromformer", "xlnet", "yoso"}
BYTE_LEVEL = {
    name for name, (_, config) in ARCHITECTURES.items() if "cls_token_id" in config and name != "rembert"
}
ENTITIES = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
ENTAILMENT = dict(enumerate(["contradiction", "neutral", "entailment"]))


def batching(family: str) -> str:
    """How the encoder batches sequence classification of this family."""
    return (
        "padding-free" if family in PADDING_FREE else "equal lengths" if family in EQUAL_LENGTHS else "padded"
    )


def has(family: str, head: str) -> bool:
    """Return whether Transformers has this model, for texts alone."""
    name, _ = ARCHITECTURES[family]
    if (family, head) in (("perceiver", "Model"), ("layoutlm", "QuestionAnswering")):
        return False  # takes no input_ids; no automatic class has it
    return hasattr(transformers, class_name(name, head))


def wordpiece_tokenizer(clean_up: bool = False) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789'.,!?-:;\"%\u4e2d\u6771\u4eac"
    words = "the of old dog runs river cafe it is over quick ly un able ##ly ##able ##ing ## n't 's do not"
    vocab = dict.fromkeys([*special, *letters, *(f"##{c}" for c in letters), *words.split()])
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=not clean_up)
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(
        zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=clean_up,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def bytelevel_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding as RoBERTa and ModernBERT have it: a character can take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([SPACED] * 3, trainer)
    cls, pad, sep, unk, mask = special
    core.post_processor = processors.RobertaProcessing(
        (sep, 2), (cls, 0), trim_offsets=True, add_prefix_space=False
    )
    names = {"cls_token": cls, "pad_token": pad, "sep_token": sep, "unk_token": unk}
    mask_token = transformers.AddedToken(mask, lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token=mask_token, **names)


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    if family == "modernbert":
        return bytelevel_tokenizer(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"])
    if family in BYTE_LEVEL:
        return bytelevel_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return wordpiece_tokenizer(clean_up=family == "electra")


def class_name(name: str, head: str) -> str:
    """Return the name of the class that Transformers' automatic classes take for this head."""
    if name in ("XLM", "Flaubert", "XLNet"):
        if head == "MaskedLM" and name != "XLNet":
            return f"{name}WithLMHeadModel"
        head = head.replace("QuestionAnswering", "QuestionAnsweringSimple")
    return f"{name}Model" if head == "Model" else f"{name}For{head}"


def make_model(family: str, head: str, **config: Any) -> Any:
    """A model whose scores differ much: as initialised all are nearly equal, and any head would look right."""
    name, more = ARCHITECTURES[family]
    tokenizer = make_tokenizer(family)
    sizes = {} if {"dim", "n_embd", "emb_dim", "d_model", "d_latents"} & more.keys() else SIZE
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    made = getattr(transformers, f"{name}Config")(**sizes | ids | more | config)
    torch.manual_seed(1)
    model = getattr(transformers, class_name(name, head))(made)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.3) if weights.dim() > 1 else weights.add_(torch.randn_like(weights) * 0.1)
    return model.eval()


def save(folder: Path, family: str, model: Any) -> str:
    """Write the model and its tokenizer; return where."""
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(family)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return str(folder)
