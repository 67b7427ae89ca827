"""The machinery that prepares and converts a model. Today: ``modules``, on torchao."""
