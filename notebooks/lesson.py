"""What the lessons share: servers, single requests, drawings, pictures, the claims ledger. Import it first.

The experiments are in the lessons. The server, its loop, the load generator and the planner are the project's own.
"""

import ast
import atexit
import contextlib
import datetime
import functools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.core.error import InputRejected
from IPython.core.getipython import get_ipython
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

if sys.platform != "linux":
    raise RuntimeError(
        "The lessons need Linux: they pin servers to cores and read /proc. Elsewhere: in a container."
    )

if not Path(sys.executable).with_name("uvicorn").exists():
    raise RuntimeError(
        "This kernel's Python does not have the project's packages. Run `make learn`, or choose the kernel .venv/bin/python."
    )

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the project, from which the lessons import
warnings.filterwarnings("ignore", message="IProgress")  # we show no progress bars
os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from loadtests import host, modes  # noqa: E402
from loadtests.compare.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, name_lines, plain_numbers  # noqa: E402
from loadtests.load import generator  # noqa: E402
from loadtests.plan import planner  # noqa: E402
from notebooks.support import said_by  # noqa: E402

QUICK = os.environ.get("QUICK") == "1"
LEARNING = os.environ.get("LEARNING") == "1"  # set by `make learn`: the guesses are the learner's own
TEXT = "Paris is the [MASK] of France."
CORES = sorted(os.sched_getaffinity(0))
# The quick form measures nothing, and several lessons run side by side: they share the cores, and servers end soon.
# Otherwise server and clients don't take each other's time.
SERVER_CORES, CLIENT_CORES = (set(CORES), set(CORES)) if QUICK else ({CORES[0]}, {CORES[-1]})
COMMON = {"TORCH_THREADS": "1"} | ({"GRACE_S": "1"} if QUICK else {})  # settings of each server
if len(CORES) < 2:
    print(
        "This machine has one core: server and clients share it, so the figures mean little, and no claim is entered."
    )

logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # where the loop writes what it survives


def quick(short: Any, full: Any) -> Any:
    """`short` in the quick form (QUICK=1), else `full`: durations, counts, lists of rates."""
    return short if QUICK else full


def holds(truth: Any, sentence: str) -> None:
    """What a measurement must show. Raises AssertionError in the full form; the quick form is too short to judge."""
    if not (truth or QUICK):
        raise AssertionError(sentence)


class UnsetGuess(InputRejected):
    """A cell needs a guess that is still `...`. Shown as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class GuessFirst(ast.NodeTransformer):
    """Keeps a cell from running while a guess is still `...`, unless the cell sets it."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self.variables = variables

    def visit(self, node: ast.AST) -> ast.AST:
        names = {
            one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
        }
        for name, value in self.variables.items():
            if name.startswith("guess") and value is ... and name not in names:
                raise UnsetGuess(
                    f"You have not guessed yet: give {name} a value where it says `...`, then go on."
                )
        return node


if shell := get_ipython():
    shell.ast_transformers.append(GuessFirst(shell.user_ns))


# --- servers ----------------------------------------------------------------------------------------------------------

_running: dict[int, contextlib.ExitStack] = {}
_started_by: dict[int, tuple[str, int]] = {}  # which cell started each server, at which of its executions

# A program that kills the process groups named on its input once that ends: when this kernel has ended, however it did.
UNDERTAKER = """
import contextlib, os, signal, sys
for group in [int(line) for line in sys.stdin]:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
"""


@functools.cache
def _undertaker() -> subprocess.Popen[bytes]:
    """So that no server of a killed kernel computes beside the next measurement."""
    command = [sys.executable, "-c", UNDERTAKER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)


def _this_cell() -> tuple[str, int]:
    parent = shell.get_parent() if shell and hasattr(shell, "get_parent") else {}
    return parent.get("metadata", {}).get("cellId", ""), shell.execution_count if shell else 0


def _stop_earlier_runs(cell: str, execution: int) -> None:
    """A cell that is run again starts its servers again; its first ones would go on beside them."""
    for key, (its_cell, its_execution) in list(_started_by.items()):
        if cell and its_cell == cell and its_execution != execution and key in _running:
            _running.pop(key).close()


def serve(
    mode: str | modes.Mode = "thread",
    *,
    cores: set[int] | None = SERVER_CORES,
    wait: bool = True,
    **settings: Any,
) -> modes.Server:
    """Start the real server in a mode of loadtests/modes.py with these settings; it answers until `stop`.

    It gets one core and one torch thread, unless told otherwise: the other core is the clients'.
    """
    env = COMMON | {name: str(value) for name, value in settings.items()}
    _stop_earlier_runs(*_this_cell())
    stack = contextlib.ExitStack()
    chosen = modes.MODES[mode] if isinstance(mode, str) else mode
    server = stack.enter_context(modes.start(chosen, env, cpus=cores, wait=wait))
    _running[id(server)], _started_by[id(server)] = stack, _this_cell()
    _undertaker().stdin.write(b"%d\n" % server.process.pid)  # type: ignore[union-attr]
    return server


def serve_recipe(name: str, **settings: Any) -> modes.Server:
    """Start minimal.py, or a program in notebooks/support; return when it has answered once (it has no /ready to ask)."""
    module = name if name == "minimal" else f"notebooks.support.{name}"
    mode = modes.Mode(name, f"uvicorn {module}:app")
    server = serve(mode, wait=False, OMP_NUM_THREADS=1, **settings)
    # It can't be asked to stop: it waits for its hung requests.
    _running[id(server)].callback(server.process.kill)
    began = time.monotonic()
    while time.monotonic() - began < 60 and server.process.poll() is None:
        if ask(server, TEXT, patience_s=60).status == 200:
            return server
        time.sleep(0.1)
    stop(server)
    raise RuntimeError(f"{name} does not answer")


def serve_all(
    *settings: dict[str, Any], mode: str = "thread", cores: set[int] | None = None
) -> list[modes.Server]:
    """Start servers side by side, one for each of `settings`: they load at the same time."""
    servers = [serve(mode, cores=cores, wait=False, **one) for one in settings]
    for server in servers:
        server.wait_until_ready()
    return servers


_generator = contextlib.ExitStack()


def stop(*servers: modes.Server) -> None:
    """Stop these servers; all that run, and the load generator, when none is given."""
    for key in [id(server) for server in servers] or list(_running):
        if stack := _running.pop(key, None):
            stack.close()
    if not servers:
        _generator.close()
        _generator.__dict__.pop("locust", None)


atexit.register(stop)


# --- load -------------------------------------------------------------------------------------------------------------


def load(server: modes.Server, scenario: str, **options: Any) -> pd.DataFrame:
    """Run a scenario of loadtests/load/generator.py on the clients' core; a row for every request."""
    if not hasattr(_generator, "locust"):
        _generator.locust = _generator.enter_context(generator.generator(CLIENT_CORES))  # type: ignore[attr-defined]
    return _generator.locust.run(server.url, scenario, **options)  # type: ignore[attr-defined]


def capacity(server: modes.Server, duration_s: float, **options: Any) -> float:
    """Right answers a second at saturation."""
    users = options.pop("users", 16)
    df = load(
        server, "closed", users=users, duration_s=duration_s + 0.5, limit_s=10.0, timeout_s=20.0, **options
    )
    return generator.throughput_per_s(df, 0.5)


def apart(work: Callable[[], Any], cores: set[int] | None = None) -> Any:
    """What `work` gives in a thread of its own, on these cores: in this one, Jupyter's event loop is running."""

    def run() -> Any:
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def simulate(cost: planner.CostLaw, **options: Any) -> pd.DataFrame:
    """`planner.simulate`, apart."""
    return apart(lambda: planner.simulate(cost, **options))


# --- single requests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What came back, and after how long. `status` is 0 when the client's patience ended first."""

    status: int
    body: str
    ms: float
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: modes.Server | str,
    text: str | None = TEXT,
    *,
    path: str = "",
    patience_s: float = 30.0,
    **headers: str,
) -> Reply:
    """POST `text` to / and return the reply; GET `path` when `text` is None. Waits for `patience_s`, then leaves."""
    url = (server if isinstance(server, str) else server.url) + path.lstrip("/")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, None if text is None else text.encode(), named)
    began = time.perf_counter()

    def since() -> float:
        return (time.perf_counter() - began) * 1000

    try:
        with urllib.request.urlopen(request, timeout=patience_s) as response:
            body = response.read().decode()
            return Reply(response.status, body, since(), dict(response.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read().decode(), since(), dict(error.headers))
    except OSError:
        return Reply(0, "nothing", since())


def get(server: modes.Server | str, path: str, patience_s: float = 30.0) -> Reply:
    """GET `path`."""
    return ask(server, None, path=path, patience_s=patience_s)


def ask_together(
    server: modes.Server | str, texts: Sequence[str], patience_s: float = 30.0, gap_s: float = 0.0
) -> list[Reply]:
    """Ask all of `texts` at once, each on its own connection, `gap_s` apart; return the replies in the same order."""

    def one(i: int, text: str) -> Reply:
        time.sleep(i * gap_s)
        return ask(server, text, patience_s=patience_s)

    with ThreadPoolExecutor(max(1, len(texts))) as pool:
        return list(pool.map(one, range(len(texts)), texts))


def counters(server: modes.Server) -> dict[str, float]:
    """The server's own /metrics: each sample's value by its name with labels."""
    lines = get(server, "metrics").body.splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, value in [line.rsplit(" ", 1)]}


# --- pictures ---------------------------------------------------------------------------------------------------------

COLORS = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]

plt.rcParams |= {
    "figure.figsize": (6.4, 4.0),  # readable on a phone
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "lines.linewidth": 2,
    "lines.markersize": 8,
    "legend.frameon": False,
    "legend.fontsize": 12,
}


@contextlib.contextmanager
def picture(title: str, x: str, y: str, **axes: Any) -> Iterator[Axes]:
    """Axes with a title and labels; at the end each labelled series gets its name beside its last point."""
    _, ax = plt.subplots()
    yield ax
    ax.set(title=title, xlabel=x, ylabel=y, **axes)
    names = [label.get_text() for label in ax.get_yticklabels()]
    if any("your guess" in name for name in names):
        ax.set_yticks(ax.get_yticks(), [whose(name) for name in names])
    plain_numbers(*(one for one in (ax.xaxis, ax.yaxis) if one.get_scale() == "log" and one.isDefault_majfmt))
    name_lines(ax)
    plt.show()


def line(ax: Axes, x: Any, y: Any, label: str = "predicted", color: str = "black", **style: Any) -> None:
    """A prediction."""
    ax.plot(x, y, label=label, color=color, **style)


def bars(ax: Axes, x: Any, y: Any, label: str = "predicted") -> None:
    """Predictions, one upright bar for each row y."""
    ax.plot(x, y, "|", color="black", markersize=30, markeredgewidth=3, label=label)


def dots(ax: Axes, x: Any, y: Any, label: str = "measured", color: str = BLUE, **style: Any) -> None:
    """A measurement."""
    ax.plot(x, y, "o", label=label, color=color, **style)


def guessed(ax: Axes, x: Any, y: Any, label: str = "your guess") -> None:
    """The guess that was made before."""
    ax.plot(x, y, "*", color=PURPLE, markersize=15, label=whose(label) if label else label)


# --- guesses ----------------------------------------------------------------------------------------------------------

_compared: list[
    tuple[str, float, float]
] = []  # of each comparison: its name, the guess and the formula as factors


def whose(text: str) -> str:
    """`text`, in which nobody is told to have guessed who only reads: a stored notebook shows common guesses."""
    if LEARNING:
        return text
    for mine, common in (
        ("your guess", "a common guess"),
        ("Your guess", "A common guess"),
        ("you guessed", "a common guess is"),
        ("You guessed", "A common guess is"),
        ("you said", "a common guess is"),
        ("You said", "A common guess is"),
    ):
        text = text.replace(mine, common)
    return text


def factor_off(value: float, measured: float) -> float:
    """How many times too high or too low `value` is: 1 for a perfect one, infinite where one of the two is not above zero."""
    if value == measured:
        return 1.0
    return max(value / measured, measured / value) if value > 0 and measured > 0 else math.inf


def off(value: float, measured: float) -> str:
    """The same in words: "3.2 × too low"."""
    factor = factor_off(value, measured)
    if factor < 1.05:
        return "right"
    where = "high" if value > measured else "low"
    return f"{factor:.2g} × too {where}" if factor < math.inf else f"too {where}"


def digits(value: float) -> str:
    """Three digits of it; all of a large one's: 2,479."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def compare(what: str, *, guess: float, formula: float, measured: float) -> None:
    """Show one line: the guess, the formula and the measurement, and how far off the first two are. `score` counts it."""
    _compared.append((what, factor_off(guess, measured), factor_off(formula, measured)))
    tell(
        f"*{what}.* Your guess: {digits(guess)} ({off(guess, measured)}). Formula: {digits(formula)} ({off(formula, measured)})."
        f" Measured: **{digits(measured)}**."
    )


def score() -> None:
    """Show how far off the guesses of this lesson were, and its formulas."""

    def times(factor: float) -> str:
        return f"{factor:.2g} ×" if factor < math.inf else "no factor"

    table(
        [
            {"how far off": what, "your guess": times(guess), "formula": times(formula)}
            for what, guess, formula in _compared
        ]
    )
    guesses = [guess for _, guess, _ in _compared]
    formulas = [formula for _, _, formula in _compared]
    better = sum(guess <= formula for guess, formula in zip(guesses, formulas))
    tell(
        f"Your guess is off by {times(statistics.median(guesses))} in the median, the formula by"
        f" {times(statistics.median(formulas))}. The guess is at least as good as the formula in {better} of {len(_compared)}."
    )


# --- drawings, tables, sentences --------------------------------------------------------------------------------------

WAY = ("clients", "server.py", "queue", "loop", "thread", "model")


def way(*rows: Sequence[str], changed: Collection[str] = (), title: str = "") -> None:
    """Draw the way of a request from box to box, a row for each server; boxes named in `changed` stand out.

    Without rows: the way through this project's server.
    """
    chains = rows or (WAY,)
    longest = max(map(len, chains))
    _, ax = plt.subplots(figsize=(1.25 * longest, 0.75 * len(chains) + (0.35 if title else 0)))
    for row, chain in enumerate(chains):
        for column, name in enumerate(chain):
            if not name:
                continue
            x, y = column * 1.5, -row * 0.9
            color = ORANGE if name in changed else GREY
            ax.add_patch(
                FancyBboxPatch(
                    (x - 0.5, y - 0.25),
                    1,
                    0.5,
                    boxstyle="round,pad=0.04",
                    edgecolor=color,
                    facecolor="white",
                    linewidth=2.5 if name in changed else 1.2,
                )
            )
            ax.text(x, y, name, ha="center", va="center", fontsize=11)
            if column and chain[column - 1]:
                ax.annotate("", (x - 0.55, y), (x - 0.95, y), arrowprops={"arrowstyle": "->", "color": GREY})
    ax.set(xlim=(-0.7, longest * 1.5 - 0.8), ylim=(-0.9 * len(chains) + 0.5, 0.4), title=title)
    ax.axis("off")
    plt.show()


def table(rows: pd.DataFrame | Sequence[dict[str, Any]] | str, *values: Sequence[Any]) -> None:
    """Show rows as a table; its columns' names say what they are, and in which unit.

    Either a frame or dicts, or the columns' names ("text | formula, ms | measured, ms"), then the values of each row.
    """
    if isinstance(rows, str):
        rows = pd.DataFrame([*values], columns=rows.split(" | "))
    frame = pd.DataFrame(rows).astype(object)
    text = planner.markdown(frame.where(frame.notna(), "-").astype(str).to_dict("records"))
    display(Markdown(whose(text)))


def tell(text: str) -> None:
    """Show a paragraph of Markdown: what a measurement says, with its figures."""
    display(Markdown(whose(text)))


def said(condition: Any, sentence: str, otherwise: str = "") -> None:
    """Show the sentence where what it states was measured, else `otherwise`: prose that rests on a number goes with it."""
    if text := sentence if condition else otherwise:
        tell(text)


# --- the ledger -------------------------------------------------------------------------------------------------------

VERDICTS = ("holds", "fails", "depends", "untested")


def claim(text: str, *, who: str, number: str, verdict: str, shown: bool = True) -> None:
    """Enter a common claim into notebooks/claims.md: what was measured, what came out, whether it holds.

    The verdict begins with one of VERDICTS. Who says so is in support/said_by.py. Of a claim that can't be tested here,
    `number` says what it would take; unless `shown` it is only in the ledger.
    """
    if verdict.split()[0].rstrip(":,;") not in VERDICTS:
        raise ValueError(f"a verdict begins with one of {', '.join(VERDICTS)}: {verdict!r}")
    on = f"{host.processor()}, {len(CORES)} cores, {datetime.date.today()}"
    entry = {"claim": text, "who": who, "number": number, "verdict": verdict, "on": on}
    lines = [f"> **“{text}”**", f"> Said by: {said_by.link(text)}", f"> {who}: {number}"]
    lines.append(f"> Verdict: **{verdict}**")
    text = "  \n".join(lines) if shown else ""
    display(Markdown(text), metadata={"claim": entry} if len(CORES) > 1 else {})
