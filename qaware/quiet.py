"""Silence what a user cannot act on, narrowly, by message. Real errors are never touched.

Standard library only: it must run before torch and torchao are imported.
"""

from __future__ import annotations

import logging
import warnings

_LOGGED = {
    # Optional CUDA kernels of the torchao wheel, which a CPU or an older GPU cannot load.
    "torchao": ("Failed to load ",),
    # torchao registers two enums in a way that torch 2.13 announces to be deprecated.
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    # Lightning's advertisements of other packages, at every Trainer.
    "lightning.pytorch.utilities.rank_zero": ("Tip: For seamless cloud",),
}
_WARNED = (
    # torch_to_nnef traces with torch.jit, which still works and has no replacement there.
    r".*torch\.jit\.(trace|script)\S* is deprecated.*",
    # Lightning's advice for loaders; the corpora here are in memory, where workers cost more.
    r".*does not have many workers which may be a bottleneck.*",
    r".*LeafSpec.* is deprecated.*",
    # ExecuTorch's own kernels, traced, in a word that torch 2.13 announces to be deprecated.
    r".*_check_is_size.*",
    # The gradient of adapters where weights are clipped.
    r"Sparse CSR tensor support is in beta",
    # A cache has no contents before the first token.
    r"Mutation on a buffer in the model is detected",
    # Inductor's lowering of integer linear layers, about a line of its own.
    r"To copy construct from a tensor, it is recommended to use sourceTensor",
)


class _Drop(logging.Filter):
    def __init__(self, messages: tuple[str, ...]) -> None:
        super().__init__()
        self.messages = messages

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(message in text for message in self.messages)


def install() -> None:
    """Add the filters; calling it again changes nothing."""
    for name, messages in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Drop) for f in logger.filters):
            logger.addFilter(_Drop(messages))
    for message in _WARNED:
        warnings.filterwarnings("ignore", message=message)
