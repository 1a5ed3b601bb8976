"""The same weights as GGUF files, for the servers that read these.

    python -m loadtests.peers.generation.gguf_files FOLDER

Dequantises the file that models/chat is made of, and writes F32, BF16, F16 and Q8_0 into FOLDER. Needs the package gguf.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from models import chat

TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
# The writer says these itself.
OWN = ("general.architecture", "general.file_type", "general.quantization_version")


def write(reader, name, file):
    """Write the model with its matrices in this type; vectors stay float32, as llama.cpp has them."""
    writer = GGUFWriter(file, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in OWN:
            kind = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=kind)
    writer.add_file_type(TYPES[name])
    for tensor in reader.tensors:
        data = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        dtype = GGMLQuantizationType.F32 if data.ndim == 1 else GGMLQuantizationType[name]
        writer.add_tensor(tensor.name, quantize(data, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        reader = GGUFReader(chat.download(scratch))
        for name in TYPES:
            write(reader, name, folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / f"{name}.gguf")
