"""Small random models of images and sounds, made on the spot: folders as `save_pretrained` writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.support.small_models import wordpiece_tokenizer

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**SIZE, "image_size": 32, "patch_size": 8}
LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}
SPEECH = {
    **SIZE,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 8),
    "conv_stride": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def save(folder: Path, model: Any, *parts: Any) -> None:
    """Write the model, its weights drawn so that scores differ, and what prepares its inputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.2, generator=generator)
    for part in (model, *parts):
        part.save_pretrained(folder)


def vit(folder: Path) -> None:
    config = transformers.ViTConfig(**VISION, **LABELS)
    save(folder, transformers.ViTForImageClassification(config), vit_processor())


def vit_processor() -> Any:
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def vit_features(folder: Path) -> None:
    save(folder, transformers.ViTModel(transformers.ViTConfig(**VISION)), vit_processor())


def resnet(folder: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **LABELS
    )
    save(folder, transformers.ResNetForImageClassification(config), vit_processor())


def clip(folder: Path) -> None:
    tokenizer = wordpiece_tokenizer()
    text = {**SIZE, "vocab_size": len(tokenizer), "eos_token_id": 3, "max_position_embeddings": 64}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    save(folder, transformers.CLIPModel(config), transformers.CLIPImageProcessor(**size), tokenizer)


def siglip(folder: Path) -> None:
    tokenizer = wordpiece_tokenizer()
    text = {**SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    tokenizer.model_input_names = ["input_ids"]
    save(folder, transformers.SiglipModel(config), processor, tokenizer)


def detr(folder: Path) -> None:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=6,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        **LABELS,
    )
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    save(folder, transformers.DetrForObjectDetection(config), processor)


def segformer(folder: Path) -> None:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1] * 4,
        depths=[1] * 4,
        decoder_hidden_size=16,
        **LABELS,
    )
    processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
    save(folder, transformers.SegformerForSemanticSegmentation(config), processor)


def maskformer(folder: Path) -> None:
    backbone = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=6,
    )
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **LABELS
    )
    processor = transformers.MaskFormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32
    )
    save(folder, transformers.MaskFormerForInstanceSegmentation(config), processor)


def glpn(folder: Path) -> None:
    config = transformers.GLPNConfig(
        hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1] * 4, depths=[1] * 4, decoder_hidden_size=16
    )
    save(folder, transformers.GLPNForDepthEstimation(config), transformers.GLPNImageProcessor())


def audio(folder: Path) -> None:
    config = transformers.Wav2Vec2Config(**SPEECH, **LABELS, classifier_proj_size=16)
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    save(folder, model, transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True))


def ctc(folder: Path) -> None:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    config = transformers.Wav2Vec2Config(**SPEECH, vocab_size=len(letters), pad_token_id=0)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    features = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    save(folder, transformers.Wav2Vec2ForCTC(config), tokenizer, features)


def whisper(folder: Path) -> None:
    special = [
        "<|startoftranscript|>",
        "<|en|>",
        "<|de|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "<|endoftext|>", *special, *times])}
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in ["<|endoftext|>", *special]])
    core.add_tokens([AddedToken(token, normalized=False) for token in times])
    end = vocab["<|endoftext|>"]
    tokenizer = transformers.WhisperTokenizer(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=special,
    )
    config = transformers.WhisperConfig(
        vocab_size=len(vocab),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=80,
        max_target_positions=24,
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=end,
        decoder_start_token_id=vocab["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    ids = {"lang_to_id": {f"<|{code}|>": vocab[f"<|{code}|>"] for code in ("en", "de")}}
    ids["task_to_id"] = {task: vocab[f"<|{task}|>"] for task in ("transcribe", "translate")}
    model.generation_config = transformers.GenerationConfig(
        **ids,
        is_multilingual=True,
        no_timestamps_token_id=vocab["<|notimestamps|>"],
        max_length=20,
        decoder_start_token_id=vocab["<|startoftranscript|>"],
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
    )
    save(folder, model, tokenizer, transformers.WhisperFeatureExtractor())


def clap(folder: Path) -> None:
    tokenizer = wordpiece_tokenizer()
    text = {**SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    sound = {
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
    }
    layout = {"spec_size": 128, "num_mel_bins": 64, "window_size": 4, "patch_size": 4, "num_classes": 4}
    config = transformers.ClapConfig(
        text_config=text, audio_config={**sound, **layout, "projection_dim": 16}, projection_dim=16
    )
    features = transformers.ClapFeatureExtractor(
        sampling_rate=16_000, max_length_s=2, truncation="rand_trunc"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    save(folder, transformers.ClapModel(config), features, tokenizer)


MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "vit": ("image-classification", vit),
    "resnet": ("image-classification", resnet),
    "vit features": ("image-feature-extraction", vit_features),
    "clip": ("zero-shot-image-classification", clip),
    "siglip": ("zero-shot-image-classification", siglip),
    "detr": ("object-detection", detr),
    "segformer": ("image-segmentation", segformer),
    "maskformer": ("image-segmentation", maskformer),
    "glpn": ("depth-estimation", glpn),
    "audio": ("audio-classification", audio),
    "whisper": ("automatic-speech-recognition", whisper),
    "clap": ("zero-shot-audio-classification", clap),
    "ctc": ("automatic-speech-recognition", ctc),
}
