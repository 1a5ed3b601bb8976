"""One model in several runtimes, on one core: how fast, how alike, how soon, how heavy.

    $ python -m notebooks.support.l10_runtimes

Prints a Markdown table. Each runtime is a fresh process that loads only what it needs. All answer alike: the five
likeliest words with score and sentence. They are asked in turn, so that a slower minute of the machine meets all.
"""

import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "minilm-mlm"
# 180 MB that not everybody wants: pip install --no-deps --target .peers/openvino openvino==2026.4.1 openvino-telemetry
OPENVINO = ROOT / ".peers" / "openvino"
FILLER = "and then they went along the old road that led from the harbour to the town on the hill"

Texts = Sequence[str]
Answers = list[list[dict[str, Any]]]  # for each text five of {"token", "token_str", "score", "sequence"}
Predict = Callable[[Texts], Answers]


def texts(count: int, lengths: str = "short") -> list[str]:
    """Sentences of 6 to 14 tokens; if mixed, one in ten has 200."""
    lines = (FOLDER / "cloze60.tsv").read_text(encoding="utf-8").splitlines()
    chosen = [lines[i % len(lines)].split("\t")[0] for i in range(count)]
    if lengths == "mixed":
        filler = (FILLER.split() * 12)[:190]
        chosen = [" ".join([text, *filler]) if i % 10 == 5 else text for i, text in enumerate(chosen)]
    return chosen


def lengths(asked: Texts) -> list[int]:
    """How many tokens each text has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    return [len(row.ids) for row in tokenizer.encode_batch(list(asked))]


# --- the runtimes; each runs in a process of its own, which has one core ----------------------------------------------


class Asked:
    """The tokenizer alone, without Transformers: texts to padded ids, and scores to words."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.mask = self.tokenizer.token_to_id("[MASK]")

    def ids(self, asked: Texts) -> dict[str, Any]:
        import numpy as np

        rows = self.tokenizer.encode_batch(list(asked))
        inputs = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
        }
        return {name: np.array(value, np.int64) for name, value in inputs.items()}

    def places(self, ids: Any) -> Any:
        import numpy as np

        return np.nonzero(ids == self.mask)

    def answers(self, ids: Any, at: Any, logits: Any) -> Answers:
        """The five likeliest words for each row of logits, at its mask."""
        return [self.five(row.copy(), place, each) for row, place, each in zip(ids, at, logits)]

    def five(self, ids: Any, place: int, logits: Any) -> list[dict[str, Any]]:
        import numpy as np

        odds = np.exp(logits - logits.max())
        best = np.argpartition(-logits, 5)[:5]
        found = []
        for token in best[np.argsort(-logits[best])].tolist():
            ids[place] = token
            words = {
                "token_str": self.tokenizer.decode([token]),
                "sequence": self.tokenizer.decode(ids.tolist()),
            }
            found.append({"score": float(odds[token] / odds.sum()), "token": token} | words)
        return found


def pytorch(dtype: str, compiled: bool = False) -> Predict:
    """Tokenise, pad, the model's own forward, the head on every token."""
    import torch
    from transformers import AutoModelForMaskedLM

    torch.set_num_threads(1)
    net: Any = AutoModelForMaskedLM.from_pretrained(FOLDER, dtype=dtype).eval()
    asked = Asked()
    forward = torch.compile(net, dynamic=True) if compiled else net

    @torch.inference_mode()
    def predict(batch: Texts) -> Answers:
        inputs = asked.ids(batch)
        rows, at = asked.places(inputs["input_ids"])
        logits = forward(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
        return asked.answers(inputs["input_ids"], at, logits[rows, at].float().numpy())

    if compiled:
        for size in (1, 8):  # a batch of one is a program of its own
            predict(texts(size))
    return predict


def onnx(file: str, folder: Path, head_at_mask: bool = False) -> Predict:
    """ONNX Runtime on a graph that `export` wrote."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    asked = Asked()

    def predict(batch: Texts) -> Answers:
        inputs = asked.ids(batch)
        rows, at = asked.places(inputs["input_ids"])
        if head_at_mask:
            (logits,) = session.run(None, inputs | {"rows": rows, "at": at})
        else:
            logits = session.run(None, inputs)[0][rows, at]
        return asked.answers(inputs["input_ids"], at, logits)

    return predict


def openvino(precision: str, folder: Path) -> Predict:
    """OpenVINO on the same graph. By itself it takes bfloat16 where the processor has it."""
    sys.path.append(str(OPENVINO))
    from openvino import Core

    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    compiled = Core().compile_model(str(folder / "float32.onnx"), "CPU", options)
    request, asked = compiled.create_infer_request(), Asked()

    def predict(batch: Texts) -> Answers:
        inputs = asked.ids(batch)
        rows, at = asked.places(inputs["input_ids"])
        logits = request.infer(inputs)[0][rows, at]
        return asked.answers(inputs["input_ids"], at, logits)

    return predict


def server(fast: bool, dtype: str = "float32") -> Predict:
    """What this server runs, without HTTP: its fast path, or the stock pipeline."""
    from workers import tasks
    from workers.settings import Settings

    task = tasks.make(Settings(FAST=fast, DTYPE=dtype, TORCH_THREADS=1, DEVICE="cpu"))
    model = task.load(0)
    return lambda batch: model([task.check(text, {}).content for text in batch])


TORCH, ONNX, OPEN = ("torch", "transformers"), ("onnxruntime", "tokenizers"), ("openvino", "tokenizers")
# What it is called; how it is loaded, given the folder of exported graphs; the packages that it needs.
RUNTIMES: dict[str, tuple[Callable[[Path], Predict], Sequence[str]]] = {
    "stock pipeline": (lambda folder: server(False), TORCH),
    "PyTorch": (lambda folder: pytorch("float32"), TORCH),
    "PyTorch, bfloat16": (lambda folder: pytorch("bfloat16"), TORCH),
    "torch.compile": (lambda folder: pytorch("float32", compiled=True), TORCH),
    "ONNX Runtime": (lambda folder: onnx("float32.onnx", folder), ONNX),
    "ONNX Runtime, int8": (lambda folder: onnx("int8.onnx", folder), ONNX),
    "ONNX Runtime, mask": (lambda folder: onnx("mask.onnx", folder, True), ONNX),
    "OpenVINO": (lambda folder: openvino("f32", folder), OPEN),
    "OpenVINO, bfloat16": (lambda folder: openvino("bf16", folder), OPEN),
    "fast path": (lambda folder: server(True), TORCH),
    "fast path, bfloat16": (lambda folder: server(True, "bfloat16"), TORCH),
}


def export(folder: Path, head_at_mask: bool) -> dict[str, float]:
    """Write the graph in float32 and in int8, and maybe one whose head runs at the mask only; seconds that each took."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForMaskedLM

    net = AutoModelForMaskedLM.from_pretrained(FOLDER, dtype="float32").eval()
    # The head's weights are the embeddings': as a table of their own they can be laid out, and be int8, for a product.
    decoder = net.get_output_embeddings()
    decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
    ids, mask = torch.ones(2, 3, 8, dtype=torch.int64)
    batch, tokens, masks = map(torch.export.Dim, ("batch", "tokens", "masks"))
    grid, each = {0: batch, 1: tokens}, {0: masks}
    names = ["input_ids", "attention_mask", "rows", "at"]
    took_s = {}

    def write(model: Any, file: str, inputs: tuple[Any, ...], shapes: tuple[Any, ...]) -> None:
        began = time.perf_counter()
        options = {"input_names": names[: len(inputs)], "dynamic_shapes": shapes, "verbose": False}
        torch.onnx.export(model, inputs, folder / file, dynamo=True, **options)
        took_s[file] = time.perf_counter() - began

    write(net, "float32.onnx", (ids, mask.clone()), (grid, grid))
    began = time.perf_counter()
    only = {"op_types_to_quantize": ["MatMul"], "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_dynamic(folder / "float32.onnx", folder / "int8.onnx", **only)
    took_s["int8.onnx"] = time.perf_counter() - began
    if head_at_mask:

        class AtMask(torch.nn.Module):  # type: ignore[misc]
            def forward(self, ids: Any, mask: Any, rows: Any, at: Any) -> Any:
                return net.cls(net.bert(ids, mask).last_hidden_state[rows, at])

        some = torch.arange(3)
        inputs = (ids, mask.clone(), some, some.clone())
        write(AtMask().eval(), "mask.onnx", inputs, (grid, grid, each, each))
    return took_s


def limits(seconds: float) -> dict[str, float]:
    """What this core can do at most, see `speeds`. And "counted": the operations of a pass of ten tokens, as torch counts
    them; an addition and a multiplication are two.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForMaskedLM

    from notebooks.support.speeds import speeds

    torch.set_num_threads(1)
    found = speeds(seconds)
    with torch.inference_mode():
        net = AutoModelForMaskedLM.from_pretrained(
            FOLDER, dtype="float32", attn_implementation="eager"
        ).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.ones(1, 10, dtype=torch.int64))
    return found | {"counted": counter.get_total_flops()}


def installed_mb(names: Sequence[str], alone: bool = False) -> float:
    """MB of all that pip installs for these packages, or of these alone, as their own lists of files say."""
    from loadtests.packages import listed_mb, required

    return listed_mb(package for name, package in required(names).items() if not alone or name in names)


# --- what the lesson shows --------------------------------------------------------------------------------------------

LEAN = {
    "ONNX Runtime, mask",
    "fast path",
    "fast path, bfloat16",
}  # the head at the mask only, no padding computed
MARKS = {"limit": ("|", "black", 15), "predicted": ("|", "black", 15), "your guess": ("*", "#CC79A7", 13)}


def rows(ax: Any, names: Sequence[str], series: dict[str, Sequence[float]]) -> None:
    """A row for each name; which mark is what stands below."""
    from lesson import BLUE, ORANGE, whose  # type: ignore[import-not-found]  # beside the lessons

    colors = iter((ORANGE, BLUE) if len(series.keys() - MARKS.keys()) > 1 else (BLUE,))
    drawn = []
    for what, values in series.items():
        mark, color, size = MARKS.get(what) or ("o", next(colors), 7)
        style = {"color": color, "markersize": size, "markeredgewidth": 3 if mark == "|" else 1}
        drawn += ax.plot(values, range(len(names)), mark, label="_", **style)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.figure.set_size_inches(7.2, 0.33 * len(names) + 1.9)
    ax.figure.legend(drawn, list(map(whose, series)), loc="outside lower center", ncols=4, handletextpad=0.2)


def work(operations: Callable[[int, int], int], n: Sequence[int], size: int, lean: bool) -> int:
    """Operations for texts of n tokens, `size` a call: each call padded to its longest, or lean."""
    if lean:
        return sum(operations(one, 1) for one in n)
    calls = [n[k : k + size] for k in range(0, len(n), size)]
    return sum(len(call) * operations(max(call), max(call)) for call in calls)


def memory(running: dict[str, Any]) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """MB after the first answer, at most, and on disk, by runtime; then stop them."""
    held, peaks, installed = {name: process.first for name, process in running.items()}, {}, {}
    for name, process in running.items():
        peaks[name], installed[name] = process.ask("peak"), process.ask("installed")
        process.stop()
    return held, peaks, installed


def verdicts(
    gain: dict[str, Any], installed: dict[str, float], held: dict[str, float]
) -> list[dict[str, str]]:
    """The lesson's two claims, for the ledger."""
    faster = smaller = "it takes `pip install onnxruntime onnx onnxscript`"
    verdict = ["untested: ONNX Runtime is not installed"] * 2
    if "mixed" in gain:
        short, mixed = gain["short"], gain["mixed"]
        faster = (
            f"{short[0]:.1f}, {short[1]:.1f} and {short[2]:.1f} times for 1, 8 and 32 short texts a call, {mixed:.1f} times for"
            f" {gain['size']} of mixed lengths; the fast path, which is PyTorch too, is {gain['fast path']:.1f} times as fast as"
            " ONNX Runtime there, which pads and runs its head at each token"
        )
        depends = "depends on the batch: it saves the fixed part of a call" if short[0] > 1.3 else "fails"
        (mine, its), (mine_held, its_held) = (
            [mb[name] for name in ("ONNX Runtime", "PyTorch")] for mb in (installed, held)
        )
        smaller = f"{mine:.0f} MB against {its:.0f}; in memory after the first answer {mine_held:.0f} MB against {its_held:.0f}"
        ratio = f"fails for the figures; {its / mine:.0f} times smaller all the same"
        verdict = ["holds" if min(*short, mixed) >= 2 else depends, "holds" if mine <= 50 else ratio]
    return [
        {
            "who": "ONNX Runtime against PyTorch, both float32, the same model and texts, one core, without HTTP",
            "number": faster,
            "verdict": verdict[0],
        },
        {
            "who": "what pip installs for ONNX Runtime and a tokenizer, against PyTorch (as it is installed here) and Transformers",
            "number": smaller,
            "verdict": verdict[1],
        },
    ]


# --- in the process ---------------------------------------------------------------------------------------------------


def memory_mb(line: str) -> float:
    """This process's memory: VmRSS now, VmHWM at its largest. All its pages, as if it were alone."""
    status = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) for row in status.splitlines() if row.startswith(line)) * 1024 / 1e6


def answer(name: str, folder: Path, pipe: Connection) -> None:
    """Load the runtime, say so after the first answer, then do what is asked until the pipe closes."""
    load, packages = RUNTIMES[name]
    predict = load(folder)
    predict(texts(1))
    pipe.send(memory_mb("VmRSS"))
    while True:
        what, batch = pipe.recv()
        if what == "time":
            began = time.perf_counter()
            for asked in batch:
                predict(asked)
            pipe.send(time.perf_counter() - began)
        elif what == "answers":
            pipe.send([found for asked in batch for found in predict(asked)])
        elif what == "peak":
            pipe.send(memory_mb("VmHWM"))
        else:
            pipe.send(installed_mb(packages))


# Besides being a runtime a process can do one thing and end.
ERRANDS: dict[str, Callable[..., Any]] = {"export": export, "limits": limits}


def child(fd: int, name: str, *arguments: Any) -> None:
    """What a process of this module does: an errand, or a runtime. Sends the error's sentence where it fails."""
    with Connection(fd) as pipe:
        try:
            if name in ERRANDS:
                pipe.send(ERRANDS[name](*arguments))
            else:
                answer(name, arguments[0], pipe)
        except (EOFError, BrokenPipeError):
            pass  # not wanted any more
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            pipe.send(RuntimeError(f"{type(error).__name__}: {said[0][:100]}"))


# --- from outside -----------------------------------------------------------------------------------------------------


class Failed(Exception):
    """Why a runtime has no numbers, in one sentence."""


class Running:
    """A process of this module. `start_s`: from its start to its first answer, `idle_mb`: its memory then."""

    def __init__(self, name: str, *arguments: Any, core: int | None = None, patience_s: float = 60.0) -> None:
        ours, theirs = socket.socketpair()
        self.pipe = Connection(ours.detach())
        # Where torch.compile keeps what it has made, its precompiled headers under TMPDIR: each process starts with nothing.
        self.scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        fresh = {"TORCHINDUCTOR_CACHE_DIR": f"{self.scratch.name}/compiled", "TMPDIR": self.scratch.name}
        began = time.perf_counter()
        code = f"from notebooks.support import l10_runtimes; l10_runtimes.child({theirs.fileno()}, {name!r}, *{arguments!r})"
        # Among the arguments is a path: its `repr` is PosixPath(...), a name of pathlib.
        code = f"from pathlib import *; {code}"
        if core is not None:
            code = f"import os; os.sched_setaffinity(0, {{{core}}}); {code}"
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=os.environ | quiet | fresh | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                pass_fds=[theirs.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what it starts ends with it, a compiler too
            )
        try:
            self.first = self.receive(patience_s)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - began

    def receive(self, patience_s: float) -> Any:
        if not self.pipe.poll(patience_s):
            raise Failed(f"not done within {patience_s:.0f} s")
        try:
            found = self.pipe.recv()
        except EOFError:
            raise Failed("it died") from None
        if isinstance(found, Exception):
            raise Failed(str(found))
        return found

    def ask(self, what: str, batches: Sequence[Texts] = (), patience_s: float = 120.0) -> Any:
        """Have it do something: seconds of "time", "answers" to, MB of "peak" memory or of what is "installed"."""
        self.pipe.send((what, batches))
        return self.receive(patience_s)

    def stop(self) -> None:
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.scratch.cleanup()


def errand(name: str, *arguments: Any, core: int | None = None, patience_s: float = 120.0) -> Any:
    """Have a process of its own export, or measure the limits; what it found."""
    process = Running(name, *arguments, core=core, patience_s=patience_s)
    process.stop()
    return process.first


@contextlib.contextmanager
def exported(head_at_mask: bool = True) -> Iterator[tuple[Path, dict[str, float]]]:
    """A folder with the graphs, and the seconds that each took; without any where a package is missing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            took_s = errand("export", Path(folder), head_at_mask)
        except Failed as error:
            took_s = {}
            print(f"no graphs: {error}")
        yield Path(folder), took_s


def compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs."""
    from shutil import which

    return any(map(which, (os.environ.get("CXX", "g++"), "clang++", "g++")))


def start(
    names: Sequence[str], folder: Path, core: int | None = None, patience_s: float = 60.0
) -> tuple[dict[str, Running], dict[str, str]]:
    """Start these runtimes one after the other; those that answer, and why the others don't."""
    running, missing = {}, {}
    for name in names:
        if name == "torch.compile" and not compiler():
            missing[name] = "no C++ compiler"
            continue
        try:
            running[name] = Running(name, folder, core=core, patience_s=patience_s)
        except Failed as error:
            missing[name] = str(error)
    return running, missing


def rates(
    running: dict[str, Running], cells: Sequence[tuple[str, int, int]], count: int = 32
) -> dict[tuple[str, str, int], float]:
    """Texts a second by runtime, lengths and batch size, NaN for others; a cell says how many turns there are.

    Of all turns the best: what else the machine does can only slow a call down.
    """
    found: dict[tuple[str, str, int], float] = defaultdict(lambda: math.nan)
    for lengths, size, turns in cells:
        asked = texts(count, lengths)
        batches = [asked[i : i + size] for i in range(0, count, size)]
        for _ in range(turns):
            for name, process in running.items():
                per_s = count / process.ask("time", batches)
                found[name, lengths, size] = max(found.get((name, lengths, size), 0.0), per_s)
    return found


def agreement(answers: Answers, expected: Answers) -> dict[str, float]:
    """How many have the same first word, the same five, and the largest difference of a score."""
    pairs = list(zip(answers, expected, strict=True))
    return {
        "top 1": sum(found[0]["token"] == best[0]["token"] for found, best in pairs),
        "top 5": sum(
            {one["token"] for one in found} == {one["token"] for one in best} for found, best in pairs
        ),
        "score": max(
            abs(one["score"] - other["score"])
            for found, best in pairs
            for one in found
            for other in best
            if one["token"] == other["token"]
        ),
    }


def main() -> None:
    from loadtests.plan.planner import markdown

    cells = [("short", size, 6) for size in (1, 8, 32)] + [("mixed", size, 3) for size in (1, 8, 32)]
    asked = [[text] for text in texts(60)]
    with exported() as (folder, took_s):
        print("exported:", ", ".join(f"{file} {s:.1f} s" for file, s in took_s.items()), flush=True)
        running, missing = start(list(RUNTIMES), folder, core=0)
        found = rates(running, cells)
        expected = running["PyTorch"].ask("answers", asked)
        rows = []
        for name, process in running.items():
            alike = agreement(process.ask("answers", asked), expected)
            row = {"runtime": name} | {
                f"{ls} {size}": f"{found[name, ls, size]:.0f}" for ls, size, _ in cells
            }
            row |= {what: f"{value:.4g}" for what, value in alike.items()}
            row |= {"start, s": f"{process.start_s:.1f}", "idle, MB": f"{process.first:.0f}"}
            row |= {
                "peak, MB": f"{process.ask('peak'):.0f}",
                "installed, MB": f"{process.ask('installed'):.0f}",
            }
            rows.append(row)
            process.stop()
    print(markdown(rows))
    for name, why in missing.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    main()
