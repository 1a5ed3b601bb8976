"""The servers: how each is started, and what must be installed for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loadtests.modes import BASE, ROOT
from loadtests.peers.catalogue import CACHE, OURS, Peer

CHAT = ROOT / "models" / "chat"
GGUF = CACHE / "gguf"
CONTEXT = 512
# So many sequences a step takes on a core of this kind without a gap of more than 200 ms.
PACED = 24


@dataclass(frozen=True)
class Writer(Peer):
    """A server that streams OpenAI's completions. `{folder}` and `{dtype}` in its command are the model's."""

    kinds: tuple[str, ...] = ("float32", "bfloat16")
    # It writes one text after the other: others would only wait longer.
    is_serial: bool = False
    # As another one, with fewer sequences, to hold the pace that readers want: only its goodput is measured.
    is_paced: bool = False
    # The name that requests must give.
    model: str = "any"
    # The type of its GGUF file for each of its kinds, where it reads one.
    gguf: Mapping[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> "Writer":
        """Return it with its command for this type of numbers."""
        command = self.command.replace("{folder}", str(CHAT)).replace("{dtype}", kind)
        return replace(self, command=command)

    def settings(self, kind: str, calls: object = None) -> dict[str, str]:
        """The environment variables that give it the model."""
        file = str(GGUF / f"{self.gguf[kind]}.gguf") if self.gguf else ""
        env = super().settings("float32") | {"PEER_MODEL": str(CHAT), "PEER_DTYPE": kind, "PEER_GGUF": file}
        return env | ({"DTYPE": kind} if self.is_ours else {})


def ours(name: str, **env: str) -> Writer:
    """This server with these settings."""
    model = {
        "TASK": "text-generation",
        "MODEL": str(CHAT),
        "CONTEXT_TOKENS": str(CONTEXT),
        "KV_CACHE_MB": "1600",
    }
    command = "uvicorn server:app --no-access-log --port {port}"
    return Writer(f"{OURS}{name}", command, {**BASE, **model, **env})


def paced(writer: Writer) -> Writer:
    """The same server with PACED sequences."""
    return replace(
        writer,
        name=f"{writer.name}, {PACED} sequences",
        kinds=("float32",),
        code=(),
        is_paced=True,
    )


APP = "python -m uvicorn loadtests.peers.generation.{}:app --no-access-log --port {{port}}"
SERVE = (
    "python -m transformers.cli.transformers serve {folder} --dtype {dtype} --device cpu "
    "--host 127.0.0.1 --port {port}"
)
BLOCKS = " --continuous-batching --cb-block-size 16 --cb-num-blocks 2200 --cb-max-batch-tokens 256"
VLLM = (
    "python -m vllm.entrypoints.openai.api_server --model {folder} --served-model-name any --dtype {dtype} --max-model-len 512 --max-num-seqs 64 "
    "--no-enable-log-requests --host 127.0.0.1 --port {port}"
)
ON_CORE = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
# Without it OpenVINO 2026.4 ends with SIGFPE in bfloat16 on a core with AMX; float32 does not use AMX.
NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
F16 = {"float32": "F16", "bfloat16": "F16"}
WRITERS = {
    writer.name: writer
    for writer in (
        ours(""),
        paced(ours("", MAX_SEQUENCES=str(PACED))),
        Writer("fastapi-generate", APP.format("fastapi_generate"), needs="fastapi", code=("generation/fastapi_generate",), kinds=("float32",), is_serial=True),
        Writer("transformers-serve", SERVE, needs="transformers_serve", kinds=("float32",), is_serial=True, model=str(CHAT)),
        Writer("transformers-serve-cb", SERVE + BLOCKS, needs="transformers_serve", model=str(CHAT)),
        Writer("litserve", "python -m loadtests.peers.generation.litserve_stream {port}", needs="litserve",
               code=("generation/litserve_stream",), kinds=("float32",), is_serial=True),
        Writer("llama.cpp-avx2", "python -m loadtests.peers.generation.llama_cpp {port}", needs="llama_cpp", code=("generation/llama_cpp",),
               kinds=("float32", "bfloat16", "Q8_0"), gguf={"float32": "F32", "bfloat16": "BF16", "Q8_0": "Q8_0"}),
        Writer("vllm", VLLM, ON_CORE, needs="vllm"),
        paced(Writer("vllm", VLLM.replace("seqs 64", f"seqs {PACED}"), ON_CORE, needs="vllm")),
        Writer("openvino-genai", APP.format("openvino_steps"), NO_AMX, needs="openvino", code=("generation/openvino_steps",), gguf=F16),
        paced(Writer("openvino-genai", APP.format("openvino_steps"), {**NO_AMX, "PEER_SEQUENCES": str(PACED)}, needs="openvino", gguf=F16)),
    )
}  # fmt: skip
