"""Code, errors, docs and the page use the field's words. The lessons may teach a word of their own."""

import re

import pytest

from loadtests.modes import ROOT

# What this project once said, and what it says now.
WORDS = {
    r"\bdoors?\b": "endpoint, API or protocol",
    r"\bnoes\b|\bsa(?:y|ys|id) no\b": "rejection, reject, 503",
    r"(?<![Tt]here )\b(?:is|are|was|were) no (?!longer|more|fewer|less|larger|better|use\b|need|room|way|reason)": "is not a",
    r"\banew\b": "again",
    r"\bfor ever\b": "forever",
    r"\bforetells?\b|\bforetold\b": "predict",
    r"\bheeds?\b": "follow",
    r"\bmend(?:s|ed)?\b": "fix",
    r"\ba (?:line|text|request|call) a (?:line|text|request|call|second)\b": "per",
    r"\bembedded model\b|\bmodel embedded\b": "bundled model",
    r"\bfor company\b": "for more requests",
    r"\bcop(?:y|ies) of the model\b|\bmodel's cop(?:y|ies)\b": "instance of the model",
    r"\bclass of (?:one's|your|their) own\b|\bown class(?:es)?\b": "custom class",
    r"\b[Ee]nvelope\b|\bonlookers?\b|\bConsiderate\b": "middleware, observer, AdaptiveThreads",
    r"\btwins?\b": "simulator",
    r"\bclosed by (?:full|idle)\b": "dispatched because",
    r"\bfolk wisdom\b": "common claims",
    r"\binstant model\b": "no-op model",
    r"\b(?:answers|requests|texts|inputs|tokens|batches|rejections|calls) a second\b": "per second",
    r"\bright answers?\b": "goodput, correct responses",
    r"\b(?:twice|times) (?:its|their) load\b": "2× capacity",
    r"\b[Ss]upervisors?\b": "process manager",
    r"\bin a crowd\b": "in a batch, under concurrency",
    r"\b[Ww]ho(?:ever)\b": "name the actor",
}
FILES = [
    ROOT / name
    for pattern in (
        "*.py", "workers/**/*.py", "workers/**/*.html", "deploy/**/*.py", "deploy/**/*.yml", "deploy/**/*.cfg",
        "loadtests/**/*.py", "examples/**/*.py", "docs/*.md", "docs/*.py", "*.md", "Makefile",
    )
    for name in ROOT.glob(pattern)
    if name.name != "CHANGELOG.md"
]  # fmt: skip


@pytest.mark.parametrize("pattern", WORDS, ids=lambda pattern: re.sub(r"\W+", " ", pattern).strip())
def test_private_words_are_gone(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"say: {WORDS[pattern]}\n" + "\n".join(found[:40])


def test_names_of_tests_have_no_private_words() -> None:
    words = "doors?|refuses|refusals?|noes|anew|whoever|for_ever|embedded_model|(?:is|are)_no(?!_larger|_longer|_more)"
    private = rf"def (test_\w*_(?:{words})(?:_\w+)?)\("
    found = [name for path in ROOT.glob("tests/test_*.py") for name in re.findall(private, path.read_text())]
    assert not found
