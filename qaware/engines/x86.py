"""torchao's X86 Inductor quantizer, whose import registers compiler passes and changes a setting."""

from __future__ import annotations

from typing import Any


def x86_quantizer() -> Any:
    """The module ``x86_inductor_quantizer`` of torchao. Inductor's setting for a pass of one's own, which its
    import takes, is as before; the passes that it registers act on frozen programs only."""
    from torch._inductor import config

    setting = config.pre_grad_custom_pass
    try:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    finally:
        config.pre_grad_custom_pass = setting
    return x86_inductor_quantizer
