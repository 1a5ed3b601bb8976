"""The comparison with other servers: two of them in quick form, and what keeps the tables honest."""

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest

from loadtests.load.expected import Expected
from loadtests.load.request_forms import FORMS
from loadtests.peers import __main__ as peers
from loadtests.peers import failures, report
from loadtests.peers.catalogue import FOLDER, PEERS, Peer
from loadtests.peers.environments import NotInstalled, requirements
from loadtests.peers.visit import Row

OTHERS = [peer for peer in PEERS.values() if not peer.is_ours]
FILES = sorted({name for peer in OTHERS for name in peer.code})


@pytest.mark.parametrize("name", FILES)
def test_peer_is_short_and_names_the_page_that_it_follows(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 50
    assert "https://" in text.split('"""')[1]


@pytest.mark.parametrize("peer", OTHERS, ids=lambda peer: peer.name)
def test_every_version_of_a_peer_is_pinned(peer: Peer) -> None:
    assert all("==" in line or line == "transformers<5" for line in requirements(peer))


def test_every_cell_of_the_features_was_run_or_names_its_page() -> None:
    with (FOLDER / "features.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert cells and all(cell["source"] == "run" or cell["source"].startswith("https://") for cell in cells)
    named = {(cell["feature"], cell["server"]) for cell in cells if cell["value"]}
    assert named == {(cell["feature"], other["server"]) for cell in cells for other in cells}


ANSWER = [{"token": i, "score": 0.5 / (i + 1)} for i in range(5)]


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("embeddings")])
def test_answer_is_taken_out_of_each_form_of_reply(form: str) -> None:
    replies: dict[str, Any] = {
        "bentoml": [ANSWER],
        "pytriton": {"outputs": [{"name": "answer", "data": [json.dumps(ANSWER)]}]},
    }
    assert FORMS[form].answer(json.dumps(replies.get(form, ANSWER)).encode()) == ANSWER
    assert FORMS[form].answer(b"an error page") is None


def test_answer_agrees_with_the_pipelines_or_it_does_not() -> None:
    expected = [[one["token"], one["score"]] for one in ANSWER]
    float32, bfloat16 = (Expected({"a text": expected}, dtype) for dtype in ("float32", "bfloat16"))
    moved = [one | {"score": one["score"] + 0.01} for one in ANSWER]
    others = [one | {"token": one["token"] + 5} for one in ANSWER]
    assert float32.agrees("a text", ANSWER) and bfloat16.agrees("a text", moved)
    for wrong in (moved, others, ANSWER[:4], {"error": "it failed"}, None, []):
        assert not float32.agrees("a text", wrong)


def test_disturbed_measurement_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        Row("mosec", "float32", repeat, "short 64", "per_s", value, others)
        for repeat, (value, others) in enumerate([(100.0, 0.0), (10.0, 1.0), (102.0, 0.1)])
    ]
    rows.append(Row("litserve", "float32", 0, "short 64", "per_s", 5.0, 1.0))
    pd.DataFrame(rows, columns=Row._fields).to_csv(tmp_path / "peers.csv", index=False)
    (tmp_path / "peers.json").write_text(json.dumps({"failures": {}}))
    results = report.Results(tmp_path)
    assert results.cell("mosec", "float32", "short 64", "per_s") == "101 (100 to 102)"
    assert results.cell("litserve", "float32", "short 64", "per_s") == "~5"
    assert (results.disturbed, results.measurements) == (2, 4)


def test_server_is_gone_when_all_of_its_processes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["true"]) as first:
        first.wait()
        server: Any = SimpleNamespace(process=first)
        monkeypatch.setattr(failures, "BACK_S", 0.1)
        assert failures.ended(server, [psutil.Process(other.pid)]).endswith("its others keep running")
        family = [psutil.Process(other.pid)]
        other.kill()
        monkeypatch.setattr(failures, "BACK_S", 30.0)
        assert failures.ended(server, family).startswith("exits after")


def test_peers_are_added_to_the_results_that_are_there(tmp_path: Path) -> None:
    rows = [
        Row(peer, model, 0, "short 64", "per_s", 1.0, 0.0)
        for peer in ("mosec", "litserve")
        for model in ("float32", "instant")
    ]
    pd.DataFrame(rows, columns=Row._fields).to_csv(tmp_path / "peers.csv", index=False)
    machine = {"processor": "P", "versions": {"torch": "1"}, "date": "2026-11-26"}
    (tmp_path / "peers.json").write_text(
        json.dumps(
            {
                **machine,
                "failed": {"mosec": "float32: it broke", "litserve": "flat: it hung"},
                "size": {"mosec": 1},
            }
        )
    )
    about = {**machine, "date": "2026-12-01"}
    kept = peers.without(tmp_path, ["mosec"], ["float32"], about)
    assert kept == [row for row in rows if (row.peer, row.model) != ("mosec", "float32")]
    added = {"date": "2026-12-01", "models": ["float32"], "peers": ["mosec"]}
    assert about == {
        **machine,
        "failed": {"litserve": "flat: it hung"},
        "size": {"mosec": 1},
        "added": [added],
    }
    with pytest.raises(SystemExit, match="versions"):
        peers.without(tmp_path, ["mosec"], ["float32"], machine | {"versions": {"torch": "2"}})


def test_server_that_cannot_be_installed_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(needs: str, lines: tuple[str, ...]) -> None:
        if needs == "mosec":
            raise NotInstalled("pip: no such version")

    monkeypatch.setattr(peers, "prepare", prepare)
    monkeypatch.setattr(peers, "installed_mb", lambda peer: 1.0)
    about: dict[str, Any] = {"size": {}, "failed": {}}
    assert peers.install([PEERS["mosec"], PEERS["fastapi-def"]], about) == [PEERS["fastapi-def"]]
    assert about["failed"] == {"mosec": "not installed: pip: no such version"}


def test_server_that_does_not_start_is_named_in_its_row_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = Peer("mosec", "python -c raise(SystemExit(3))", kinds=("instant",))
    fine = Peer("fastapi-def", PEERS["fastapi-def"].command, code=("fastapi_def",), kinds=("instant",))
    monkeypatch.setitem(PEERS, "mosec", broken)
    monkeypatch.setitem(PEERS, "fastapi-def", fine)
    command = [
        "--quick",
        "--only",
        "--peers",
        "mosec",
        "fastapi-def",
        "--models",
        "instant",
        "--out",
        str(tmp_path),
    ]
    assert peers.main(command) == 1
    text = (tmp_path / "peers.md").read_text()
    assert "- mosec: instant: it ended with code 3" in text
    assert "| fastapi-def |" in text
    assert max(line.count(" | ") for line in text.splitlines() if line.startswith("| ")) < 6, "still readable"


@pytest.mark.slow
def test_two_peers_are_measured_in_quick_form(tmp_path: Path) -> None:
    command = ["--quick", "--only", "--peers", "fastapi-def", "fastapi-batch", "--out", str(tmp_path)]
    assert peers.main([*command, "--models", "float32"]) == 0
    rows = pd.read_csv(tmp_path / "peers.csv")
    assert set(rows["peer"]) == {"fastapi-def", "fastapi-batch"}
    right = rows[rows["metric"] == "n_200"].groupby(["peer", "what"])["value"].sum()
    for peer in ("fastapi-def", "fastapi-batch"):
        assert (right[peer] > 0).all() and {"short 1", "mixed 64", "at 80%"} <= set(right[peer].index)
    assert "n_wrong" not in set(rows["metric"]), "every answer is the pipeline's"
    assert (tmp_path / "peers.png").exists() and (tmp_path / "peers-overload.png").exists()
