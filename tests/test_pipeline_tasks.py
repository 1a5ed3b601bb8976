"""Pipelines of images, sounds, tables and texts: each answers as the plain pipeline does alone, however it was batched."""

import base64
import functools
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from loadtests.modes import MODES, start
from tests.support import small_media
from tests.support.small_models import wordpiece_tokenizer
from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import pipeline
from workers.tasks.common import media, stock
from workers.tasks.common.parameters import REFUSED, TAKES
from workers.tasks.common.stock import Batched, in_json, same
from workers.web.replies import rendered

MODELS = small_media.MODELS
IMAGES = [
    media.example_image(seed, *size) for seed, size in enumerate([(64, 48), (64, 48), (50, 90), (40, 40)])
]
SOUNDS = [media.example_sound(seed, seconds) for seed, seconds in enumerate([0.5, 0.5, 0.8, 0.2])]
# What a client may set, by the name in MODELS.
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "vit": [{"top_k": 2}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "none", "top_k": 3}],
    "clip": [{"candidate_labels": ["a dog", "the river", "old"], "hypothesis_template": "It is {}!"}],
    "siglip": [{"candidate_labels": ["a dog", "the river"]}],
    "clap": [{"candidate_labels": ["a dog", "the river", "old"], "hypothesis_template": "It is {}!"}],
    "vit features": [{"pool": True}],
    "detr": [{"threshold": 0.0}, {"threshold": 0.2}],
    "segformer": [{"subtask": "semantic"}],
    "maskformer": [
        {"threshold": 0.0, "mask_threshold": 0.3, "overlap_mask_area_threshold": 0.1, "subtask": "instance"}
    ],
    "audio": [{"top_k": 1, "function_to_apply": "sigmoid"}],
    "ctc": [
        {"return_timestamps": "char"},
        {"return_timestamps": "word"},
        {"chunk_length_s": 2, "stride_length_s": 0.1},
    ],
    "whisper": [
        {"return_timestamps": True},
        {"language": "de", "task": "translate"},
        {"return_timestamps": True, "return_language": True},
        {"chunk_length_s": 1, "stride_length_s": 0.2},
    ],
}
TABLE_PARAMETERS: list[dict[str, Any]] = [{}, {"sequential": True}]
NEEDED = {
    "clip": {"candidate_labels": ["dog", "the old river"]},
    "siglip": {"candidate_labels": ["dog", "over it"]},
    "clap": {"candidate_labels": ["dog", "over it"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Where the small model of this name is, made at the first call."""

    @functools.cache
    def made(name: str) -> str:
        path = tmp_path_factory.mktemp("model")
        MODELS[name][1](path)
        return str(path)

    return made


def load(name: str, where: str, monkeypatch: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Its task and its loaded model. The gain of a batch is another test's."""
    task = tasks.make(Settings(MODEL=where, TASK=MODELS[name][0], TORCH_THREADS=1, **settings))
    return task, task.load(0)


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch gains, whatever the clock says."""
    monkeypatch.setattr(stock, "GAIN", float("inf"))


def plain(name: str, where: str) -> Callable[[bytes, dict[str, Any]], Any]:
    """What the plain pipeline says of an input alone."""
    pipe = transformers.pipeline(MODELS[name][0], model=where, device="cpu", dtype=torch.float32)

    def answer(data: bytes, parameters: dict[str, Any]) -> Any:
        value = (
            Image.open(io.BytesIO(data))
            if TAKES[MODELS[name][0]] == "image"
            else media.read_sound(data, 16_000, 60.0)
        )
        return pipe(value, **parameters)

    return answer


@pytest.mark.filterwarnings("ignore")  # Transformers' own
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "whisper")) for name in MODELS]
)
def test_answers_are_those_of_the_plain_pipeline_alone_in_batches_and_with_each_parameter(
    name: str, folder: Any, gains: None
) -> None:
    where = folder(name)
    task, model = load(name, where, BATCH_SIZE=8)
    assert model.max_batch == 8, model.description
    expected, needed = plain(name, where), NEEDED.get(name, {})
    inputs = IMAGES if TAKES[MODELS[name][0]] == "image" else SOUNDS
    asked = [(one, dict(needed)) for one in inputs]
    asked += [(one, needed | more) for more in PARAMETERS.get(name, []) for one in inputs[:2]]
    answers = [in_json(expected(*one)) for one in asked]
    contents = [task.check(data, dict(parameters)).content for data, parameters in asked]
    for i in range(0, len(contents), 8):
        assert_same(model(contents[i : i + 8]), answers[i : i + 8])
    assert_same(model(contents[:1]), answers[:1])
    if PARAMETERS.get(name) and name != "segformer":  # which has one subtask only
        assert not all(same(in_json(one), answers[0]) for one in answers[len(inputs) :: 2]), (
            "it changes something"
        )


def assert_same(answers: list[Any], expected: list[Any]) -> None:
    for answer, one in zip(answers, expected, strict=True):
        json.loads(rendered(answer))
        assert same(unfolded(answer), unfolded(one))


def unfolded(answer: Any) -> Any:
    """With the pixels of its images in place of their base64."""
    if isinstance(answer, dict):
        return {
            name: Image.open(io.BytesIO(base64.b64decode(value)))
            if name in ("mask", "depth")
            else unfolded(value)
            for name, value in answer.items()
        }
    return [unfolded(one) for one in answer] if isinstance(answer, list) else answer


@pytest.fixture(scope="module")
def vit(folder: Any) -> tuple[Any, Any]:
    return load("vit", folder("vit"))


def test_input_is_prepared_once_before_the_models_call(folder: Any, gains: None, monkeypatch: Any) -> None:
    task, model = load("vit", folder("vit"), BATCH_SIZE=4)
    prepared: list[Any] = []
    real = model.front.preprocess
    monkeypatch.setattr(
        model.front, "preprocess", lambda *one, **more: prepared.append(1) or real(*one, **more)
    )
    contents = [task.check(image, {}).content for image in IMAGES]
    assert len(prepared) == len(IMAGES)
    forwards: list[Any] = []
    pass_on = model.pipe.forward
    monkeypatch.setattr(
        model.pipe, "forward", lambda items, **more: forwards.append(1) or pass_on(items, **more)
    )
    model(contents)
    assert len(prepared) == len(IMAGES) and len(forwards) == 1, "the model's call only computes, once"
    again = model(contents[:1])
    assert_same(again, model(contents)[:1])  # run again singly, as after a batch that failed


def test_model_process_prepares_what_comes_as_bytes(folder: Any, gains: None) -> None:
    task, model = load("vit", folder("vit"), BATCH_SIZE=4)
    server = tasks.make(task.settings)
    contents = [server.check(image, {}).content for image in IMAGES]
    assert [content.inputs for content in contents] == IMAGES
    assert_same(model(contents), model([task.check(image, {}).content for image in IMAGES]))


class Changes(torch.nn.Module):
    """A model whose answer for one input depends on its neighbours."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: Any) -> Any:
        return self.model(pixel_values - pixel_values.mean(0, keepdim=True) * (len(pixel_values) > 1))


def test_batch_that_changes_answers_or_gains_nothing_is_not_made_and_the_log_says_why(
    folder: Any, vit: Any, monkeypatch: Any, gains: None
) -> None:
    task, loaded = vit
    task = tasks.make(Settings(MODEL=folder("vit"), TASK="image-classification", BATCH_SIZE=4))
    probe = [task.opened(*one).content for one in task.probes()]
    good = Batched(task, loaded.pipe, probe)
    assert good.max_batch == 4 and good.description.strategy == "up to 4 inputs of one shape together"
    monkeypatch.setattr(loaded.pipe, "model", Changes(loaded.pipe.model))
    loaded.pipe.model.dtype, loaded.pipe.model.device = torch.float32, torch.device("cpu")
    bad = Batched(task, loaded.pipe, probe)
    assert bad.max_batch == 1 and bad.description.strategy == "one by one: a batch changes answers"
    monkeypatch.undo()
    monkeypatch.setattr(stock, "GAIN", 0.0)
    slow = Batched(task, loaded.pipe, probe)
    assert slow.max_batch == 1 and slow.description.strategy.endswith(
        "a batch takes as long as its inputs one by one"
    )


@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ("clip", {}, 'there are no "candidate_labels"'),
        ("clip", {"candidate_labels": ["dog"], "hypothesis_template": "{:>300000000}"}, "no other brace"),
        (
            "clip",
            {"candidate_labels": ["dog"], "hypothesis_template": "{0.__class__.__mro__} {}"},
            "no other brace",
        ),
        ("clip", {"candidate_labels": []}, "a list of 1 to 100 words"),
        ("detr", {"threshold": 1.5}, "a number from 0 to 1"),
        ("detr", {"threshold": True}, "a number from 0 to 1"),
        ("segformer", {"subtask": "panoptic"}, "must be semantic"),
        ("ctc", {"return_timestamps": True}, "must be char or word"),
        ("ctc", {"chunk_length_s": 2, "stride_length_s": 1}, 'at least three times "stride_length_s"'),
        ("whisper", {"chunk_length_s": 31}, "a number of seconds from 1 to 30"),
        ("whisper", {"language": "klingon"}, "de or en"),
        ("ctc", {"chunk_length_s": 1e9}, "a number of seconds from 1 to 60"),
        ("vit", {"timeout": 3}, "not a known field"),
    ],
)
def test_parameter_that_breaks_its_rule_is_malformed(
    folder: Any, name: str, parameters: dict[str, Any], sentence: str
) -> None:
    task = tasks.make(Settings(MODEL=folder(name), TASK=MODELS[name][0]))
    with pytest.raises(Malformed, match=sentence):
        task.check(IMAGES[0], parameters)


def test_labels_may_be_one_text_with_commas(folder: Any) -> None:
    task = tasks.make(Settings(MODEL=folder("clip"), TASK=MODELS["clip"][0]))
    query = task.check(IMAGES[0], {"candidate_labels": "dog, the river"})
    assert query.content.parameters == {"candidate_labels": ["dog", "the river"]}
    assert query.size < task.check(IMAGES[0], {"candidate_labels": ["dog"] * 90}).size


# Sounds


def test_sound_that_cannot_be_read_is_unprocessable(folder: Any) -> None:
    task = tasks.make(Settings(MODEL=folder("ctc"), TASK=MODELS["ctc"][0]))
    for data in (b"garbage", SOUNDS[0][:44], base64.b64encode(b"RIFF").decode()):
        with pytest.raises(Unprocessable, match="the sound cannot be read; send a whole WAV"):
            task.check(data, {})


def test_sound_has_a_bounded_length_and_no_more_of_it_is_decoded(folder: Any, tmp_path: Path) -> None:
    task = tasks.make(Settings(MODEL=folder("ctc"), TASK=MODELS["ctc"][0], MAX_SOUND_S=3.0))
    flac = tmp_path / "silence.flac"
    long = ["-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", "3600", str(flac)]
    subprocess.run([media.ffmpeg(), "-loglevel", "quiet", *long], check=True)
    assert flac.stat().st_size < 1_000_000
    decoded: list[int] = []
    real = np.frombuffer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "frombuffer", lambda data, kind: decoded.append(len(data)) or real(data, kind))
        with pytest.raises(Unprocessable, match=r"the sound must last from 0\.1 s to 3 s"):
            task.check(flac.read_bytes(), {})
    assert decoded[0] < 4 * 16_000 * 4
    with pytest.raises(Unprocessable, match="must last from"):
        task.check(media.example_sound(0, 0.01), {})
    assert task.check(media.example_sound(0, 2.0), {}).size > task.check(media.example_sound(0, 1.0), {}).size


def test_whisper_walks_through_a_long_sound_as_the_pipeline_does_and_costs_its_windows(folder: Any) -> None:
    task, model = load("whisper", folder("whisper"), BATCH_SIZE=1)
    long, expected = media.example_sound(1, 45.0), plain("whisper", folder("whisper"))
    costs = []
    for parameters in ({}, {"return_timestamps": True}, {"chunk_length_s": 20}):
        query = task.check(long, dict(parameters))
        (answer,) = model([query.content])
        assert same(answer, expected(long, parameters)) and answer["text"]
        costs.append(query.size)
    short = task.check(media.example_sound(1, 3.0), {}).size
    assert [round(cost / short) for cost in costs] == [2, 2, 3], "sizes are windows of 30 s"
    (answer,) = model([task.check(long, {"return_timestamps": False}).content])
    assert same(answer, expected(long, {}))


def test_windows_that_overlap_cost_more(folder: Any) -> None:
    task = tasks.make(Settings(MODEL=folder("ctc"), TASK=MODELS["ctc"][0]))
    sound = media.example_sound(0, 10.0)
    whole = task.check(sound, {}).size
    eight_windows = task.check(sound, {"chunk_length_s": 3, "stride_length_s": 1}).size
    assert eight_windows == whole + 140, "24 s in place of 10"


def test_samples_are_those_that_transformers_reads(monkeypatch: Any, tmp_path: Path) -> None:
    from transformers.pipelines.audio_utils import ffmpeg_read

    (tmp_path / "ffmpeg").symlink_to(media.ffmpeg())
    monkeypatch.setenv("PATH", str(tmp_path))
    for rate in (8_000, 16_000):
        assert np.array_equal(media.read_sound(SOUNDS[2], rate, 60.0), ffmpeg_read(SOUNDS[2], rate))


def test_server_of_sounds_without_ffmpeg_says_what_to_install(folder: Any, monkeypatch: Any) -> None:
    media.ffmpeg.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match="pip install imageio-ffmpeg"):
        tasks.make(Settings(MODEL=folder("ctc"), TASK=MODELS["ctc"][0]))
    media.ffmpeg.cache_clear()


# Texts and tables


def gpt2(folder: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=120, eos_token_id=3
    )
    small_media.save(folder, transformers.GPT2LMHeadModel(config), wordpiece_tokenizer())


def test_generator_with_few_positions_starts_and_counts_what_it_may_generate(tmp_path: Path) -> None:
    gpt2(tmp_path)
    task = pipeline.Task(Settings(MODEL=str(tmp_path), TASK="text-generation", TORCH_THREADS=1))
    model = task.load(0)
    model([query.content for query in task.examples()])  # cut to the 64 positions
    few, many = task.check("the dog", {"max_new_tokens": 1}), task.check("the dog", {"max_new_tokens": 40})
    assert many.size - few.size == 39
    with pytest.raises(Unprocessable, match="send at most 64"):
        task.check("the dog " * 40, {})


@pytest.mark.parametrize(
    "inputs",
    [5, True, {"a": 1}, [["long"]], [[]], [{"role": "user", "content": "dog"}], {"role": "user"}, None],
)
@pytest.mark.parametrize("name", ["text-generation", "text-to-audio", "feature-extraction"])
def test_what_is_not_a_text_is_malformed(tmp_path: Path, name: str, inputs: Any) -> None:
    gpt2(tmp_path)
    with pytest.raises(Malformed, match='"inputs" must be a text'):
        pipeline.Task(Settings(MODEL=str(tmp_path), TASK=name)).check(inputs, {})


def test_what_is_not_a_table_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tapas"}')
    task = tasks.make(Settings(MODEL=str(tmp_path), TASK="table-question-answering"))
    asked = {"table": {"name": ["Ada", "Alan"], "age": ["36", "41"]}, "query": "how old is Ada?"}
    assert (
        task.check(asked, {"sequential": True}).content.inputs == asked == task.describe().example["inputs"]
    )
    for wrong in (
        "a text",
        {},
        asked | {"table": {}},
        asked | {"table": {"a": ["1"], "b": []}},
        asked | {"query": 3},
    ):
        with pytest.raises(Malformed):
            task.check(wrong, {})
    with pytest.raises(Malformed, match="each a list of as many texts"):
        task.check(asked | {"table": {"a": [1]}}, {})
    with pytest.raises(Unprocessable, match="the table is too long"):
        task.check(asked | {"table": {"a": ["word"] * 5000}}, {})


def tapas(folder: Path) -> str:
    """A random TAPAS that answers with cells, saved."""
    words = [
        "[PAD]",
        "[EMPTY]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "how",
        "old",
        "is",
        "ada",
        "alan",
        "name",
        "age",
        "?",
        "3",
        "4",
        "##1",
        "##6",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.TapasTokenizer(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    names = {0: "NONE", 1: "SUM", 2: "AVERAGE", 3: "COUNT"}
    config = transformers.TapasConfig(
        vocab_size=len(words),
        num_aggregation_labels=4,
        aggregation_labels=names,
        initializer_range=0.5,
        **sizes,
    )
    torch.manual_seed(2)
    model = transformers.TapasForQuestionAnswering(config)
    torch.nn.init.constant_(model.output_bias, 5.0)
    for part in (model, tokenizer):
        part.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.filterwarnings("ignore")  # Transformers' own
def test_tables_get_the_answers_of_the_plain_pipeline(tmp_path: Path) -> None:
    where, name = tapas(tmp_path), "table-question-answering"
    plain = transformers.pipeline(name, model=where, device="cpu", dtype=torch.float32)
    task = tasks.make(Settings(MODEL=where, TASK=name, TORCH_THREADS=1))
    model = task.load(0)
    asked = task.describe().example["inputs"]
    tables = [asked, {"table": {"age": ["36", "", "41"]}, "query": "how old?"}]
    for parameters in TABLE_PARAMETERS:
        expected = [in_json(plain(**one, **parameters)) for one in tables]
        assert any(answer["cells"] for answer in expected)
        assert model([task.check(one, dict(parameters)).content for one in tables]) == expected
    with pytest.raises(Malformed, match="there is nothing in the table"):
        task.check({"table": {"": [" "]}, "query": "how old?"}, {})
    for table in ({"a": ["1"] * 254}, {f"a{i}": ["1"] for i in range(254)}):
        model([task.check({"table": table, "query": "how old?"}, {}).content])
        larger = table | {"b": ["1"]} if len(table) > 1 else {"a": ["1"] * 255}
        with pytest.raises(Unprocessable, match="at most 254 rows and 254 columns"):
            task.check({"table": larger, "query": "how old?"}, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_pooler", [True, False])
def test_only_a_trained_pooler_is_asked(tmp_path: Path, has_pooler: bool) -> None:
    """Transformers makes up one that is not in the files, and fails where a model has none."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    transformers.ViTModel(config, add_pooling_layer=has_pooler).save_pretrained(str(tmp_path))
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(str(tmp_path))
    task = tasks.make(Settings(MODEL=str(tmp_path), TASK="image-feature-extraction", TORCH_THREADS=1))
    model = task.load(0)
    if has_pooler:
        (answer,) = model([task.check(IMAGES[0], {"pool": True}).content])
        assert len(answer[0]) == 32
    else:
        with pytest.raises(Malformed, match='"pool" must be false: this model has no pooler'):
            task.check(IMAGES[0], {"pool": True})
        settings = {"MODEL": str(tmp_path), "TASK": "image-feature-extraction", "TORCH_THREADS": "1"}
        with start(MODES["process"], settings) as server:  # its model is loaded elsewhere
            reply = httpx.post(server.url, files={"file": IMAGES[0]}, data={"pool": "true"}, timeout=60)
            assert (reply.status_code, "this model has no pooler" in reply.text) == (400, True)


def test_text_to_speech_is_text_to_audio_and_starts_with_characters_as_tokens(tmp_path: Path) -> None:
    letters = {"<pad>": 0, " ": 1, **{letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    tokenizer = transformers.VitsTokenizer(
        str(tmp_path / "vocab.json"), pad_token="<pad>", unk_token="<pad>", phonemize=False
    )
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
        "flow_size": 16,
    }
    config = transformers.VitsConfig(
        **sizes,
        vocab_size=30,
        spectrogram_bins=9,
        upsample_initial_channel=16,
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1,
        depth_separable_num_layers=1,
    )
    transformers.VitsModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = Settings(MODEL=str(tmp_path), TASK="text-to-speech", TORCH_THREADS=1, MAX_TOKENS=64)
    task = tasks.make(settings)
    assert task.name == "text-to-audio"  # type: ignore[attr-defined]
    model = tasks.load(task, settings)  # warms up with its examples
    (answer,) = model([task.check("a dog", {}).content])
    assert answer["audio"].ndim == 1 and answer["sampling_rate"] == 16_000


# Tasks that are not served


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("summarization", "Transformers 5 has removed it; serve a chat model with TASK=text-generation"),
        ("translation_en_to_fr", "Transformers 5 has removed it"),
        ("visual-question-answering", "Transformers 5 has removed it for image-text-to-text"),
        ("video-classification", "serve it with a custom class"),
        ("text_to_speach", "did you mean text-to-speech?"),
    ],
)
def test_task_that_is_not_served_says_why_or_what_was_meant(task: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        tasks.make(Settings(TASK=task))


def test_each_pipeline_of_transformers_is_served_or_has_a_reason() -> None:
    from transformers.pipelines import REMOVED_TASKS, SUPPORTED_TASKS, TASK_ALIASES

    assert TASK_ALIASES == tasks.ALIASES
    for task in [*SUPPORTED_TASKS, *REMOVED_TASKS]:
        assert task in TAKES or task in REFUSED or tasks.file_of(task), task
    assert not REFUSED.keys() & TAKES.keys()
