"""MODEL=examples.pydantic_model:Loan uvicorn server:app -- inputs, parameters and answers that pydantic checks.

$ pip install pydantic
$ curl --json '{"inputs": {"amount": 1000, "months": 12}, "parameters": {"rate": 0.06}}' http://127.0.0.1:8000/
{"monthly":86.07,"total":1032.8}
$ curl --json '{"inputs": {"amount": 1000, "months": 0}}' http://127.0.0.1:8000/
{"error":"\\"months\\": Input should be greater than 0"}
"""

from pydantic import BaseModel, Field


class Asked(BaseModel, extra="forbid"):
    amount: float = Field(gt=0)
    months: int = Field(gt=0, le=600)


class Terms(BaseModel, extra="forbid"):
    rate: float = Field(0.05, gt=0, lt=1)


class Plan(BaseModel):
    monthly: float
    total: float


class Loan:
    """What a loan costs."""

    example = {"amount": 1000, "months": 12}  # noqa: RUF012

    def check(self, inputs: Asked, parameters: Terms) -> tuple[Asked, Terms]:
        return inputs, parameters  # both are valid here: what is not was a 422 that names the field

    def __call__(self, inputs: list[tuple[Asked, Terms]]) -> list[Plan]:
        return [plan(*pair) for pair in inputs]


def plan(asked: Asked, terms: Terms) -> Plan:
    """The plan of equal payments."""
    rate = terms.rate / 12
    monthly = asked.amount * rate / (1 - (1 + rate) ** -asked.months)
    return Plan(monthly=round(monthly, 2), total=round(monthly * asked.months, 2))
