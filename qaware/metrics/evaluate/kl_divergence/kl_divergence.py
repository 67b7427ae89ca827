"""KL divergence between two models' predictions, as an `evaluate` metric."""

# evaluate reads imports line by line with a regular expression: one module on each line.
import datasets
import evaluate
import torch

from qaware.metrics.nats import kl_divergence

_INPUTS = """
Args:
    predictions: rows of logits of the model to judge, one row a token or sample.
    references: the same rows of the float model.
Returns:
    kl_divergence: mean KL(softmax(reference) || softmax(prediction)) of a row, in nats.
"""


class KlDivergence(evaluate.Metric):
    """Computed in float64, whatever precision the logits came in."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Mean KL divergence of a model's predictions from the float model's, in nats.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        judged = torch.tensor(predictions, dtype=torch.float64)
        float_model = torch.tensor(references, dtype=torch.float64)
        return {"kl_divergence": float(kl_divergence(float_model, judged).mean())}
