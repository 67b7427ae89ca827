"""How often two models' best guesses are the same, as an `evaluate` metric."""

# evaluate reads imports line by line with a regular expression: one module on each line.
import datasets
import evaluate
import torch

from qaware.metrics.nats import same_top1

_INPUTS = """
Args:
    predictions: rows of logits of the model to judge, one row a token or sample.
    references: the same rows of the float model.
Returns:
    top1_agreement: share of rows where both have the same argmax.
"""


class Top1Agreement(evaluate.Metric):
    """Among equal logits the first one counts as the argmax, in both models."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Share of rows whose argmax equals the float model's.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        judged = torch.tensor(predictions, dtype=torch.float64)
        float_model = torch.tensor(references, dtype=torch.float64)
        return {"top1_agreement": float(same_top1(float_model, judged).double().mean())}
