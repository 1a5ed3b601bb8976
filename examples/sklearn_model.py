"""MODEL=examples.sklearn_model:Species BATCH_SIZE=32 uvicorn server:app -- vectors to a scikit-learn classifier.

$ pip install scikit-learn
$ curl --json '{"inputs": [5.1, 3.5, 1.4, 0.2]}' http://127.0.0.1:8000/
{"species":"setosa","probability":0.98…}
$ curl --json '{"inputs": [[5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]]}' http://127.0.0.1:8000/
[{"species":"setosa",…},{"species":"virginica",…}]
"""

from typing import Any

from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression


class Species:
    """The species of an iris, by four lengths in cm."""

    example = (5.1, 3.5, 1.4, 0.2)
    input_rank = 1  # one input is a list: without this it would be four inputs

    def __init__(self) -> None:
        flowers = load_iris()
        self.names = flowers.target_names
        self.model = LogisticRegression(max_iter=1000).fit(flowers.data, flowers.target)

    def check(self, inputs: Any, parameters: dict[str, Any]) -> list[float]:
        if len(inputs) != 4 or not all(isinstance(cm, int | float) for cm in inputs):
            raise ValueError("send four numbers")
        return list(inputs)

    def __call__(self, inputs: list[list[float]]) -> list[dict[str, Any]]:
        chances = self.model.predict_proba(inputs)  # one call for the whole batch
        return [{"species": str(self.names[row.argmax()]), "probability": row.max()} for row in chances]
