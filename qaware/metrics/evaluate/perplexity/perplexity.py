"""Perplexity of token losses, as an `evaluate` metric."""

# evaluate reads imports line by line with a regular expression: one module on each line.
import math

import datasets
import evaluate

from qaware.metrics.nats import perplexity

_INPUTS = """
Args:
    predictions: for each sequence the list of its tokens' losses, -log p(token), in nats.
Returns:
    nats: mean loss of a token, over all tokens of all sequences.
    perplexity: exp(nats).
    bits_per_token: nats / ln 2.
"""


class Perplexity(evaluate.Metric):
    """Losses are summed over tokens before they are divided: a long sequence counts for more."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity from token losses in nats, summed in float64.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        losses = [loss for sequence in predictions for loss in sequence]
        if not losses:
            raise ValueError("predictions: no token losses in any sequence; give at least one")
        nats = math.fsum(losses) / len(losses)
        return {"perplexity": perplexity(nats), "nats": nats, "bits_per_token": nats / math.log(2)}
