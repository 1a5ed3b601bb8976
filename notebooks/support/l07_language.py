"""A model of one's own: a plain module that guesses a text's language, and the class that a server can run.

LANGUAGE_WEIGHTS=weights.pt MODEL=notebooks.support.l07_language:Language uvicorn server:app
"""

import os
import sys
import unicodedata

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

# How long a thread may compute in Python before another one gets its turn.
sys.setswitchinterval(float(os.environ.get("SWITCH_S", "0.005")))

LETTERS = " abcdefghijklmnopqrstuvwxyz'"
SENTENCES = {
    "English": (
        "the train leaves in the morning|where is the next station|we had tea with our friends|she reads the old "
        "books again|they will come home tomorrow|what do you think about this|the weather was good last week|"
        "my brother works with his hands|there is nothing under the bed|you should have told us before"
    ),
    "French": (
        "le train part dans la matinée|où est la prochaine gare|nous prenons du thé avec nos amis|elle relit les "
        "vieux livres|ils rentreront chez eux demain|que pensez vous de cela|le temps était beau la semaine "
        "dernière|mon frère travaille de ses mains|il n'y a rien sous le lit|vous auriez dû nous le dire avant"
    ),
    "German": (
        "der zug fährt am morgen ab|wo liegt der nächste bahnhof|wir tranken tee mit unseren freunden|er liest die "
        "alten bücher noch einmal|morgen kommen wir nach hause|was hältst du davon|das wetter war letzte woche gut|"
        "mein bruder arbeitet mit den händen|neben dem bett liegt nichts|das hättet ihr uns vorher sagen sollen"
    ),
}
LANGUAGES = list(SENTENCES)


class Net(nn.Module):
    """Letters as numbers in, a score for each language out. It knows nothing of servers."""

    def __init__(self, width=128):
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS) + 1, width, padding_idx=0)
        self.look = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(3))
        self.score = nn.Linear(width, len(LANGUAGES))

    def forward(self, letters):
        real = (letters > 0)[:, None]  # not the zeros that make all texts of a batch equally long
        x = self.letters(letters).transpose(1, 2)
        for look in self.look:
            x = (x + look(x).relu()) * real
        return self.score(x.sum(-1) / real.sum(-1))


def cleaned(text):
    """Small letters without accents, one blank between words. Pure Python, a letter at a time."""
    letters = []
    for letter in unicodedata.normalize("NFD", text.lower()):
        if letter in LETTERS and not (letter == " " and letters[-1:] == [" "]):
            letters.append(letter)
    return "".join(letters)


def numbers(text, rounds=1):
    """The letters' numbers. More rounds stand for more Python: they clean again what is clean."""
    for _ in range(rounds):
        text = cleaned(text)
    return torch.tensor([LETTERS.index(letter) + 1 for letter in text or " "])


def train(net, steps=30):
    """Teach it the sentences."""
    known = [
        (numbers(text), LANGUAGES.index(name)) for name in LANGUAGES for text in SENTENCES[name].split("|")
    ]
    x, y = (
        pad_sequence([row for row, _ in known], batch_first=True),
        torch.tensor([name for _, name in known]),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


class Language:
    """The language of a text."""

    example = "Where is the station?"

    def __init__(self):
        self.net = Net()
        self.net.load_state_dict(torch.load(os.environ["LANGUAGE_WEIGHTS"], weights_only=True))

    @staticmethod
    def check(inputs, parameters):
        if not isinstance(inputs, str) or not inputs.strip():
            raise ValueError("send a text")
        if (rounds := parameters.get("rounds", 1)) not in range(1, 10_001):
            raise ValueError("rounds must be a whole number from 1 to 10,000")
        return inputs, int(rounds)

    @torch.inference_mode()
    def __call__(self, inputs):
        rows = [numbers(text, rounds) for text, rounds in inputs]  # Python
        scores = self.net(pad_sequence(rows, batch_first=True)).softmax(-1)  # torch
        best = zip(*(both.tolist() for both in scores.max(-1)))
        return [{"language": LANGUAGES[which], "score": round(score, 4)} for score, which in best]
