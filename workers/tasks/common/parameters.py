"""What a client may set of each stock pipeline, and which tasks are not served and why.

Not all that a pipeline takes: with some of it a client could load code or hold the model for minutes.
"""

import math
from typing import Any

from workers.settings import Settings
from workers.tasks.common.text import (
    BOOLEAN_RULE,
    Rule,
    choice_rule,
    number_rule,
    words_rule,
)

# What a task's pipeline takes. A text would be an address or a path on this machine to pipelines of images and sounds.
TAKES = {
    "audio-classification": "audio",
    "automatic-speech-recognition": "audio",
    "depth-estimation": "image",
    "document-question-answering": "image",
    "feature-extraction": "text",
    "image-classification": "image",
    "image-feature-extraction": "image",
    "image-segmentation": "image",
    "object-detection": "image",
    "table-question-answering": "table",
    "text-generation": "text",
    "text-to-audio": "text",
    "zero-shot-audio-classification": "audio",
    "zero-shot-image-classification": "image",
}
CHAT = "Transformers 5 has removed it; serve a chat model with TASK=text-generation"
CUSTOM = "serve it with a custom class, MODEL=my_model:Class"
REFUSED = {
    "any-to-any": f"its inputs are chats with images and sounds, which can't be bounded before they are read; {CUSTOM}",
    "conversational": CHAT,
    "decision": f"its inputs are states of a robot, of a form of each model's own; {CUSTOM}",
    "image-text-to-text": f"it generates from chats with images; {CUSTOM}",
    "image-to-image": f"Transformers 5 has removed it; with Diffusers, {CUSTOM}",
    "image-to-text": f"Transformers 5 has removed it for image-text-to-text; {CUSTOM}",
    "keypoint-matching": f"an input is a pair of images; {CUSTOM}",
    "mask-generation": f"it runs the model on hundreds of points of one image; {CUSTOM}",
    "summarization": CHAT,
    "text2text-generation": CHAT,
    "translation": CHAT,
    "video-classification": f"decoding a video can't be bounded; {CUSTOM}",
    "visual-question-answering": f"Transformers 5 has removed it for image-text-to-text; {CUSTOM}",
    "vqa": f"Transformers 5 has removed it for image-text-to-text; {CUSTOM}",
    "zero-shot-object-detection": f"it runs the model once per label; {CUSTOM}",
}
WHISPER_S = 30  # a window of Whisper's: a shorter sound is padded to it
SEGMENTS_ALL = {"conditional_detr", "detr", "eomt", "mask2former", "maskformer", "oneformer"}
FRACTION_RULE = Rule(
    "a number from 0 to 1",
    lambda value: type(value) in (int, float) and 0 <= value <= 1,
    {"type": "number", "minimum": 0, "maximum": 1},
)
# One pair of braces and no other: `str.format` obeys a client that asks for a width of a billion.
TEMPLATE_RULE = Rule(
    "a text with one {} where the label goes, and no other brace",
    lambda value: (
        isinstance(value, str) and value.count("{}") == 1 and not set("{}") & set(value.replace("{}", ""))
    ),
    {"type": "string", "pattern": r"^[^{}]*\{\}[^{}]*$"},
)


def seconds_rule(most: float, least: float = 0.0) -> Rule:
    """A duration."""
    return Rule(
        f"a number of seconds from {least:g} to {most:g}",
        lambda value: type(value) in (int, float) and math.isfinite(value) and least <= value <= most,
        {"type": "number", "minimum": least, "maximum": most},
    )


def rules_of(
    task: str, settings: Settings, config: dict[str, Any], generation: dict[str, Any]
) -> dict[str, Rule]:
    """Return the rule of each parameter. `config` and `generation` are the model's config.json and generation_config.json."""
    most = settings.MAX_TOP_K
    match task:
        case "image-classification" | "audio-classification":
            apply = choice_rule("softmax", "sigmoid", "none")
            return {"top_k": number_rule(1, most), "function_to_apply": apply}
        case "zero-shot-image-classification" | "zero-shot-audio-classification":
            return {"candidate_labels": words_rule(most), "hypothesis_template": TEMPLATE_RULE}
        case "object-detection":
            return {"threshold": FRACTION_RULE}
        case "image-segmentation":
            names = ("threshold", "mask_threshold", "overlap_mask_area_threshold")
            has_all = config.get("model_type") in SEGMENTS_ALL
            subtasks = ("panoptic", "instance", "semantic") if has_all else ("semantic",)
            return {"subtask": choice_rule(*subtasks), **dict.fromkeys(names, FRACTION_RULE)}
        case "image-feature-extraction":
            return {"pool": BOOLEAN_RULE}
        case "document-question-answering":
            lengths = {"top_k": number_rule(1, most), "max_answer_len": number_rule(1, settings.MAX_TOKENS)}
            return {**lengths, "handle_impossible_answer": BOOLEAN_RULE}
        case "automatic-speech-recognition":
            return speech_rules(settings, config, generation)
        case "table-question-answering":
            return {"sequential": BOOLEAN_RULE} if config.get("model_type") == "tapas" else {}
        case "text-generation":
            return {"max_new_tokens": number_rule(1, settings.MAX_TOKENS)}
    return {}


def speech_rules(settings: Settings, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Rule]:
    """Return those of speech recognition, which differ by the kind of model."""
    if config.get("model_type") == "whisper":
        is_aligned = generation.get("alignment_heads")
        stamps = Rule(
            'true or "word"' if is_aligned else "true or false",
            lambda value: value is True or value is False or bool(is_aligned and value == "word"),
            {"enum": [True, False, "word"] if is_aligned else [True, False]},
        )
        windows = {"chunk_length_s": seconds_rule(WHISPER_S, least=1.0), "stride_length_s": seconds_rule(10)}
        if not (languages := generation.get("lang_to_id")):
            return {"return_timestamps": stamps, **windows}
        codes = sorted(code.strip("<|>") for code in languages)
        spoken = {"language": choice_rule(*codes), "task": choice_rule("transcribe", "translate")}
        return {"return_timestamps": stamps, **windows, **spoken, "return_language": BOOLEAN_RULE}
    if any(name.endswith("ForCTC") for name in config.get("architectures") or []):
        window = seconds_rule(settings.MAX_SOUND_S, least=1.0)
        stamps = choice_rule("char", "word")
        return {"return_timestamps": stamps, "chunk_length_s": window, "stride_length_s": seconds_rule(30)}
    return {}


def window_is_too_short(parameters: dict[str, Any]) -> bool:
    """Whether the windows of a long sound overlap so much that the model would compute more than three times its length."""
    window = parameters.get("chunk_length_s")
    return window is not None and window < 3 * parameters.get("stride_length_s", window / 6)


def speech_windows(seconds: float, parameters: dict[str, Any]) -> tuple[int, float]:
    """Return into how many windows a sound is cut, and how long they are together; without `chunk_length_s` it is one."""
    if (window := parameters.get("chunk_length_s")) is None or seconds <= window:
        return 1, seconds
    overlap = 2 * parameters.get("stride_length_s", window / 6)
    n = math.ceil((seconds - overlap) / (window - overlap))
    return n, seconds + (n - 1) * overlap


def speech_size(seconds: float, parameters: dict[str, Any], is_whisper: bool) -> int:
    """Return what a sound costs: tenths of a second that the model computes; Whisper's windows are always of 30 s."""
    n, together_s = speech_windows(seconds, parameters)
    if is_whisper:
        together_s = WHISPER_S * max(n, math.ceil(seconds / WHISPER_S))
    return round(10 * together_s)
