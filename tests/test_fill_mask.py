"""The fast pipeline is audited against the plain one, which is asked text by text: its answers are the promise."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.pipelines.base import PipelineException
from workers.fill_mask import FastFillMaskPipeline, PackedLinear, pick_dtype

MODEL = str(Path(__file__).parents[1] / "models" / "minilm-mlm")

SENTENCES = [
    "{m} is the capital of France.",
    "Paris is the {m} of France.",
    "I can't {m} it, don't you know? He's {m}!",
    "They 've said : \" it isn ' t {m} \" ; we 're done .",
    "{m}",
    "{m} {m}",
    "{m}, {m} and {m}!?",
    "A na\u00efve caf\u00e9 in Z\u00fcrich serves {m} cr\u00e8me br\u00fbl\u00e9e.",
    "\u6771\u4eac\u306f{m}\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\u5317\u4eac\u662f {m} \u7684\u9996\u90fd\uff0c{m}\u3002",
    "I \u2764\ufe0f {m} \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467!",
    "un{m}able, antidisestablishment{m}arianism, electroencephalo{m}",
    "[CLS] already {m} [SEP] here [PAD] [UNK]",
    "<s> already {m} </s> here <pad>",
    "[PAD] <pad> {m} [PAD] {m} <pad>",
    "\t spaces \n\n and  lines {m}   . ",
    "- {m} -- 3.14 % of #1 @ (x_{m}) \\ / ~ `",
    "\u0645\u0631\u062d\u0628\u0627 {m} \u0434\u043e\u0431\u0440\u044b\u0439 {m}",
    "' {m} ' s n't 'm 've 're ' , . ! ?",
]
SPACED = "the of old dog runs isn't quickly , . unbelievable caf\u00e9 \u4e2d river ! 42 'tis over it's"
WORDS = SPACED.split()
TARGETS = [
    (),
    (),
    (),
    ("dog",),
    ("river", "old", "the"),
    ("zzzqqq", "dog"),
    ("caf\u00e9", "Dog", "42", "dog"),
]


def queries(mask: str, count: int, seed: int = 0) -> list[tuple[str, int, tuple[str, ...]]]:
    """`count` varied queries: every sentence above, and words of any number with one to three masks among them."""
    draw = random.Random(seed)
    texts = [sentence.replace("{m}", mask) for sentence in SENTENCES]
    while len(texts) < count:
        words = draw.choices(WORDS, k=draw.choice([1, 4, 8, 8, 8, 12, 40, 90]))
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            words.insert(draw.randrange(len(words) + 1), mask)
        texts.append(" ".join(words))
    draw.shuffle(texts)
    return [(text, draw.choice([1, 2, 5, 5, 5, 30]), draw.choice(TARGETS)) for text in texts]


def assert_same(stock, ours, tolerance: float = 1e-4) -> None:
    """The same JSON; scores may differ by rounding, and so may the order of two that differ by less than that."""
    assert len(stock) == len(ours)
    if stock and isinstance(stock[0], list):
        for a, b in zip(stock, ours, strict=True):
            assert_same(a, b, tolerance)
        return
    for a, b in zip(stock, ours, strict=True):
        assert list(a) == list(b) and list(map(type, a.values())) == list(map(type, b.values()))
        assert a["score"] == pytest.approx(b["score"], abs=tolerance)
        if a["token"] == b["token"]:
            assert a | {"score": 0} == b | {"score": 0}
        else:
            assert a["score"] == pytest.approx(b["score"], rel=1e-5), "not a tie, and another token"


def audit(stock, fast, asked, batch: int = 32) -> None:
    expected = [stock(text, top_k=top_k, targets=targets or None) for text, top_k, targets in asked]
    assert fast.fast
    for start in range(0, len(asked), batch):
        for a, b in zip(expected[start:], fast.answer(asked[start : start + batch]), strict=False):
            assert_same(a, b)


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
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=clean_up, **names)


def bytelevel_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding as RoBERTa and ModernBERT have it: a character can take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*SENTENCES, " ".join(WORDS)] * 3, trainer)
    cls, pad, sep, unk, mask = special
    core.post_processor = processors.RobertaProcessing(
        (sep, 2), (cls, 0), trim_offsets=True, add_prefix_space=False
    )
    names = {"cls_token": cls, "pad_token": pad, "sep_token": sep, "unk_token": unk}
    mask_token = transformers.AddedToken(mask, lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token=mask_token, **names)


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def build(family: str):
    """A small random model of the family and its tokenizer."""
    torch.manual_seed(1)
    if family in ("roberta", "modernbert"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = bytelevel_tokenizer(
            special if family == "roberta" else ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
        )
    else:
        tokenizer = wordpiece_tokenizer(clean_up=family == "electra")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    edges = {"cls_token_id": 0, "bos_token_id": 0, "sep_token_id": 2, "eos_token_id": 2}
    model = {
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, **ids)),
        "distilbert": lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **ids)
        ),
        "roberta": lambda: transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(
                max_position_embeddings=514, **SIZE, **ids, bos_token_id=0, eos_token_id=2
            )
        ),
        "electra": lambda: transformers.ElectraForMaskedLM(
            transformers.ElectraConfig(embedding_size=16, **SIZE, **ids)
        ),
        "modernbert": lambda: transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(local_attention=16, **SIZE, **ids, **edges)
        ),
    }[family]()
    with torch.no_grad():
        for (
            weights
        ) in model.parameters():  # as initialised all scores are nearly equal: any head would look right
            weights.normal_(0, 0.3) if weights.dim() > 1 else weights.add_(torch.randn_like(weights) * 0.1)
    return model.eval(), tokenizer


def pair(model, tokenizer):
    """The plain pipeline and the fast one, on two copies of the model: the fast one changes its own."""
    plain = pipeline("fill-mask", model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
    fast = pipeline(
        "fill-mask", model=model, tokenizer=tokenizer, device="cpu", pipeline_class=FastFillMaskPipeline
    )
    return plain, fast


@pytest.fixture(scope="module")
def embedded():
    plain = pipeline("fill-mask", model=MODEL, dtype=torch.float32, device="cpu")
    fast = pipeline(
        "fill-mask", model=MODEL, dtype=torch.float32, device="cpu", pipeline_class=FastFillMaskPipeline
    )
    return plain, fast


@pytest.fixture(scope="module")
def small():
    return pair(*build("bert"))


def test_embedded_model_answers_as_the_plain_pipeline_does(embedded):
    audit(*embedded, queries("[MASK]", 240))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "modernbert"])
def test_each_family_of_heads_answers_as_the_plain_pipeline_does(family):
    plain, fast = pair(*build(family))
    audit(plain, fast, queries(fast.tokenizer.mask_token, 160))


def test_answers_do_not_depend_on_how_the_batch_was_cut(small):
    plain, fast = small
    asked = queries("[MASK]", 60, seed=3)
    fast.pass_tokens, fast.pass_cost, fast.head_rows, saved = 40, 3, 2, vars(fast).copy()
    try:
        audit(plain, fast, asked, batch=60)
    finally:
        fast.pass_tokens, fast.pass_cost, fast.head_rows = (
            saved[k] for k in ("pass_tokens", "pass_cost", "head_rows")
        )
    audit(plain, fast, asked, batch=1)


def test_similar_lengths_share_a_pass_and_a_long_text_stands_alone(small):
    fast = small[1]
    assert list(fast._chunks([9, 200, 8, 9, 8])) == [[2, 4, 0, 3], [1]]
    assert all(len(chunk) * 16 <= fast.pass_tokens for chunk in fast._chunks([16] * 100))
    assert list(fast._chunks([5000])) == [[0]]


def test_ties_fall_as_they_do_in_the_plain_pipeline():
    model, tokenizer = build("bert")
    with torch.no_grad():
        model.cls.predictions.decoder.weight.zero_()
        model.cls.predictions.bias.copy_(torch.arange(len(tokenizer)) % 3)
    plain, fast = pair(model, tokenizer)
    asked = [
        ("the [MASK] dog", k, t) for k in (1, 3, 5, 40) for t in ((), ("dog", "old", "the", "of", "river"))
    ]
    expected = [plain(text, top_k=k, targets=t or None) for text, k, t in asked]
    for a, b in zip(expected, fast.answer(asked), strict=True):
        assert [row["token"] for row in a] == [row["token"] for row in b]


def test_every_token_of_the_vocabulary_is_written_as_the_plain_pipeline_writes_it(small):
    plain, fast = small
    count = len(fast.tokenizer)
    for text in ("[MASK] it is", "un [MASK] .", "[MASK] 's [MASK]", "[PAD] [MASK]"):
        assert_same(plain(text, top_k=count), fast(text, top_k=count))


def test_calls_take_what_the_plain_pipeline_takes(small):
    plain, fast = small
    one, two = "the [MASK] dog", "the [MASK] of [MASK]"
    for inputs in (one, [one], [one, two], [two] * 5):
        for kwargs in ({}, {"top_k": 2}, {"targets": "dog"}, {"targets": ["dog", "nosuchword"], "top_k": 9}):
            expected, ours = plain(inputs, **kwargs), fast(inputs, batch_size=2, **kwargs)
            pairs = (
                zip(expected, ours, strict=True)
                if isinstance(inputs, list) and len(inputs) > 1
                else [(expected, ours)]
            )
            for a, b in pairs:
                assert_same(a, b)
    cut = {"tokenizer_kwargs": {"truncation": True, "max_length": 6}}
    assert_same(plain(one + " runs" * 20, **cut), fast(one + " runs" * 20, **cut))
    fewer = pipeline(
        "fill-mask", model=fast.model, tokenizer=fast.tokenizer, top_k=3, pipeline_class=FastFillMaskPipeline
    )
    assert len(fewer(one)) == 3


def test_an_empty_batch_has_no_answers(small):
    assert small[1].answer([]) == []


@pytest.mark.parametrize("batch", [["no blank here"], ["the [MASK] dog", "no blank here"], [""]])
def test_a_text_without_a_mask_raises_what_the_plain_pipeline_raises(small, batch):
    plain, fast = small
    with pytest.raises(PipelineException) as expected:
        [plain(text) for text in batch]
    with pytest.raises(PipelineException) as ours:
        fast.answer([(text, 5, ()) for text in batch])
    assert str(ours.value) == str(expected.value)
    assert len(fast.answer([("the [MASK] dog", 5, ())])[0]) == 5, "the pipeline still works afterwards"


def test_targets_have_the_plain_pipelines_ids_without_listing_the_vocabulary_again(small, monkeypatch):
    plain, fast = small
    cases = ["dog", ["dog", "dog"], ("river", "nosuchword", "the"), ["\u2603", "old"]]
    expected = [plain.get_target_ids(targets) for targets in cases]
    monkeypatch.setattr(fast.tokenizer, "get_vocab", lambda: pytest.fail("listed the vocabulary"))
    for targets, ids in zip(cases, expected, strict=True):
        assert np.array_equal(fast.get_target_ids(targets), ids)
    with pytest.raises(ValueError, match="At least one target"):
        fast.get_target_ids([""])


def test_the_head_sees_the_masked_tokens_only(small):
    fast, seen = small[1], []
    hook = fast.model.cls.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    try:
        fast.answer([("the [MASK] of [MASK]", 5, ()), ("the old dog [MASK] over the river", 2, ("runs",))])
    finally:
        hook.remove()
    assert sorted(seen) == [1, 2], "one run for each kind of question, three masks together"


def test_a_head_that_mixes_positions_is_served_the_plain_way():
    class Mixing(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, states):
            return self.head(states + states.mean(1, keepdim=True))

    model, tokenizer = build("bert")
    model.cls = Mixing(model.cls)
    plain, fast = pair(model, tokenizer)
    assert not fast.fast
    assert not any(isinstance(module, PackedLinear) for module in fast.model.modules()), "left as it was"
    for text, top_k, targets in queries("[MASK]", 25):
        expected = plain(text, top_k=top_k, targets=targets or None)
        assert fast.answer([(text, top_k, targets)]) == [expected]
    assert fast(["the [MASK]"] * 2) == plain(["the [MASK]"] * 2)


def test_a_head_that_reads_its_weights_itself_is_served_fast_without_packing():
    model, tokenizer = build("bert")
    transform = model.cls.predictions.transform
    transform.forward = lambda x: transform.LayerNorm(torch.nn.functional.linear(x, transform.dense.weight))
    plain = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    asked = queries("[MASK]", 25)
    expected = [plain(text, top_k=top_k, targets=targets or None) for text, top_k, targets in asked]
    fast = pipeline("fill-mask", model=model, tokenizer=tokenizer, pipeline_class=FastFillMaskPipeline)
    for a, b in zip(expected, fast.answer(asked), strict=True):
        assert_same(a, b)
    assert fast.fast


def test_bfloat16_keeps_the_first_candidate_and_its_score_nearly_always(embedded):
    half = pipeline("fill-mask", model=MODEL, dtype=torch.bfloat16, pipeline_class=FastFillMaskPipeline)
    lines = (Path(MODEL) / "cloze60.tsv").read_text().splitlines()
    texts = [text for text in (line.split("\t")[0] for line in lines) if "[MASK]" in text]
    full = embedded[1].answer([(text, 1, ()) for text in texts])
    rounded = half.answer([(text, 1, ()) for text in texts])
    agree = [a[0]["token"] == b[0]["token"] for a, b in zip(full, rounded, strict=True)]
    assert sum(agree) >= 0.9 * len(texts)
    for same, a, b in zip(agree, full, rounded, strict=True):
        assert not same or a[0]["score"] == pytest.approx(b[0]["score"], abs=0.06)


def test_dtype_auto_is_bfloat16_only_where_the_processor_multiplies_it(monkeypatch):
    assert pick_dtype("float16", "cpu") is torch.float16
    assert pick_dtype("bfloat16", "cpu") is torch.bfloat16
    for can, expected in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        assert pick_dtype("auto", "cpu") is expected
    assert pick_dtype("auto", "mps") is torch.float32
