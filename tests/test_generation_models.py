"""Random tiny models of many families through the token loop's model half: the tokens of `generate`, in any company."""

import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_language_models import FAMILIES, VOCABULARY, make_model
from workers import resources
from workers.generation.memory import PAGE, regions, settle
from workers.generation.model import TokenModel, make, room
from workers.generation.scheduler import Scheduler, Sequence
from workers.generation.step_cost import StepCost
from workers.generation.steps import Limits, Options
from workers.tasks.common.packed import PackedLinear, packable

torch.set_num_threads(1)
LIMITS = Limits(5, 96)
CLOSE = 1e-4  # where the two best tokens are so near, either is right
MADE: dict[str, tuple[Any, TokenModel]] = {}


def pack(model: Any) -> None:
    for parent, name, linear in packable(model):
        setattr(parent, name, PackedLinear(linear))


def made(family: str) -> tuple[Any, TokenModel]:
    """The model as Transformers has it, and as the token loop has it."""
    if family not in MADE:
        MADE[family] = make_model(family), make(lambda: make_model(family), LIMITS, pack)
    return MADE[family]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    """What `generate` gives; it ends before the first token that is as good as another."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    for i, scores in enumerate(out.scores):
        best, second = scores[0].topk(2).values.tolist()
        if best - second < CLOSE:
            return tokens[:i]
    return tokens


def run(
    model: TokenModel, arrivals: list[tuple[int, Sequence]], leaves: dict[int, int], step_tokens: int
) -> None:
    """Run sequences through a scheduler of their own; each comes, and some leave, at a step."""
    scheduler = Scheduler(model.limits.slots, StepCost(1.0, 0.1), step_tokens)
    for number in range(2000):
        for index, (at, sequence) in enumerate(arrivals):
            if at == number and not sequence.reason:
                scheduler.add(sequence)
            if leaves.get(index) == number:
                scheduler.end(sequence, "cancelled")
        step = scheduler.plan()
        if not step:
            if number > max(at for at, _ in arrivals):
                return
            continue
        (outcomes,) = model([step.rows])
        for sequence, outcome, reason in list(scheduler.advance(step, outcomes)):
            assert not isinstance(outcome, str)
            if reason:
                scheduler.end(sequence, reason)
    raise AssertionError("it never ends")


def prompts(lengths: list[int]) -> list[list[int]]:
    return [[(13 * i * i + 7 * n + 2 * i + 5) % (VOCABULARY - 2) + 2 for i in range(n)] for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_alone_and_in_a_batch(family: str) -> None:
    stock, model = made(family)
    asked = prompts([1, 3, 17, 30, 8, 25, 2, 40])
    expected = [greedy(stock, prompt, 20) for prompt in asked]
    options = Options(max_tokens=20, end_ids=frozenset([1]))
    alone = [Sequence(prompt, options) for prompt in asked]
    for sequence in alone:
        run(model, [(0, sequence)], {}, 512)
    batch = [Sequence(prompt, options) for prompt in asked]
    run(model, [(i, sequence) for i, sequence in enumerate(batch)], {}, 16)
    for sequences in (alone, batch):
        for sequence, tokens in zip(sequences, expected, strict=True):
            assert sequence.tokens[: len(tokens)] == tokens
            assert sequence.reason in ("stop", "length")


@cache
def endless(family: str, length: int) -> list[int]:
    """What follows the prompt of this length, as `generate` has it without an end-of-sequence token."""
    stock, _ = made(family)
    stock.generation_config.eos_token_id = None
    try:
        return greedy(stock, prompts([length])[0], 15)
    finally:
        stock.generation_config.eos_token_id = 1


BY_HAND = {"llama", "qwen2", "qwen3", "mistral", "gemma"}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_and_its_relatives_are_served_by_hand_and_others_packed(family: str) -> None:
    _, model = made(family)
    assert ("by hand" in model.description) == (family in BY_HAND), model.description
    assert "packed" in model.description


COMPANY = st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 4, 11, 23, 40])), min_size=1, max_size=9)


@settings(max_examples=12, deadline=None)
@given(COMPANY, st.dictionaries(st.integers(0, 8), st.integers(1, 40)), st.sampled_from([0, 12, 40]))
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_greedy_tokens_do_not_depend_on_joining_and_leaving_sequences(
    family: str, company: list[tuple[int, int]], leaves: dict[int, int], step_tokens: int
) -> None:
    _, model = made(family)
    arrivals = [(at, Sequence(prompts([length])[0], Options(max_tokens=15))) for at, length in company]
    run(model, arrivals, leaves, step_tokens)
    for (_, sequence), (_, length) in zip(arrivals, company):
        expected = endless(family, length)[: len(sequence.tokens)]
        assert sequence.tokens[: len(expected)] == expected


def test_way_that_raises_leaves_the_model_to_its_own_forward_pass() -> None:
    def broken(model: Any) -> None:
        pack(model)
        raise RuntimeError("no such layout")

    model = make(lambda: make_model("gpt2"), LIMITS, broken)
    assert model.description == "stock forward pass"
    sequence, (asked,) = Sequence(prompts([9])[0], Options(max_tokens=10)), prompts([9])
    run(model, [(0, sequence)], {}, 16)
    expected = greedy(made("gpt2")[0], asked, 10)
    assert sequence.tokens[: len(expected)] == expected


def test_logprobs_are_those_of_the_forward_pass() -> None:
    stock, model = made("llama")
    (prompt,) = prompts([12])
    options = Options(max_tokens=6, logprobs=3)
    scheduler = Scheduler(LIMITS.slots, StepCost(1.0, 0.1))
    sequence = Sequence(prompt, options)
    scheduler.add(sequence)
    tokens = []
    while not sequence.reason and (step := scheduler.plan()):
        (outcomes,) = model([step.rows])
        for _, token, reason in list(scheduler.advance(step, outcomes)):
            tokens.append(token)
            if reason:
                scheduler.end(sequence, reason)
    with torch.inference_mode():
        ids = torch.tensor([prompt + sequence.tokens])
        logprobs = stock(ids).logits[0].log_softmax(-1)[len(prompt) - 1 :]
    for token, row in zip(tokens, logprobs):
        assert not isinstance(token, str)
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        best = row.topk(3)
        assert [id_ for id_, _ in token.likeliest] == best.indices.tolist()
        assert [p for _, p in token.likeliest] == pytest.approx(best.values.tolist(), abs=1e-3)


def sampled(family: str, asked: list[list[int]], options: Options, together: bool) -> list[list[int]]:
    _, model = made(family)
    sequences = [Sequence(prompt, options._replace(seed=i)) for i, prompt in enumerate(asked)]
    if together:
        run(model, [(i % 3, sequence) for i, sequence in enumerate(sequences)], {}, 24)
    else:
        for sequence in sequences:
            run(model, [(0, sequence)], {}, 512)
    return [sequence.tokens for sequence in sequences]


OPTIONS = [
    Options(20, temperature=1.0),
    Options(20, temperature=0.7, top_p=0.9),
    Options(20, temperature=1.5, top_k=20, min_p=0.01),
    Options(20, temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_same_seed_gives_the_same_text_alone_and_in_a_batch(options: Options) -> None:
    asked = prompts([5, 5, 19, 33, 8, 2])
    alone, batch = (sampled("llama", asked, options, together) for together in (False, True))
    assert alone == batch
    assert alone[0] != alone[1]  # other seeds


@pytest.mark.parametrize("slots", [1, 2])
def test_few_slots_are_enough_for_the_probe_and_for_many_sequences(slots: int) -> None:
    stock, _ = made("llama")
    model = make(lambda: make_model("llama"), Limits(slots, 96), pack)
    assert "by hand" in model.description
    asked = prompts([5, 19, 33])
    sequences = [Sequence(prompt, Options(max_tokens=12, end_ids=frozenset([1]))) for prompt in asked]
    run(model, [(0, sequence) for sequence in sequences], {}, 24)
    for sequence, prompt in zip(sequences, asked):
        expected = greedy(stock, prompt, 12)
        assert sequence.tokens[: len(expected)] == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are Linux's")
def test_weights_may_go_on_huge_pages_and_stay_as_they_are() -> None:
    weights = torch.arange(1 << 24)
    settle()
    assert torch.equal(weights, torch.arange(1 << 24))
    middle = weights.data_ptr() + weights.nbytes // 2
    (region,) = [each for each in regions() if each[0] <= middle < each[1]]
    assert all(address % PAGE == 0 for address in region)


def test_model_that_has_no_room_for_one_sequence_says_what_to_change() -> None:
    from workers.generation.model import limits_of

    with pytest.raises(ValueError, match="raise KV_CACHE_MB or lower CONTEXT_TOKENS"):
        limits_of(make_model("llama"), 1024, 1000, 64)


def test_kv_cache_takes_what_a_gpu_has_free_beside_the_weights_or_a_part_of_the_containers_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    monkeypatch.setattr(resources, "limit_bytes", lambda: 4 * 10**9)
    assert [room(torch.device(name)) for name in ("cuda:0", "cpu")] == [8 * 10**8, 5 * 10**8]


@pytest.mark.slow
def test_smollm2_gives_the_tokens_of_generate_alone_and_in_a_batch() -> None:
    import subprocess

    import transformers

    from workers.settings import HERE

    folder = HERE / "models" / "chat"
    subprocess.run(["make", "models/chat/config.json"], cwd=HERE, check=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stock.generation_config.eos_token_id = None
    model = make(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        Limits(8, 256),
        pack,
    )
    assert "by hand" in model.description
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "The capital of France is",
        "Once upon a time",
        "def fibonacci(n):",
        "Water boils at",
        "In 1969, humans",
    ]
    asked = [tokenizer(text)["input_ids"] for text in texts]
    expected = [greedy(stock, ids, 24) for ids in asked]
    sequences = [Sequence(ids, Options(max_tokens=24)) for ids in asked]
    run(model, [(2 * i, sequence) for i, sequence in enumerate(sequences)], {}, 12)
    for sequence, tokens in zip(sequences, expected, strict=True):
        assert sequence.tokens[: len(tokens)] == tokens
