"""ONNX Runtime: fp32, its dynamic int8, and MatMulNBits int4 in groups of 32 with int8 activations
(``accuracy_level=4``), all by its own quantizers; convolutions in static int8 (QDQ)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.contender import CNN, LM, Contender, Runtime, Session
from benchmarks.inputs import SIZES, Array, Size, empty_past, images, past_names, texts


class OnnxRuntime(Runtime):
    """``.onnx`` on the CPU provider; past keys and values go in with each call."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx", "onnxscript")
    variants: ClassVar = {LM: ("fp32", "int8", "int4"), CNN: ("fp32", "int8")}

    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """The float file, or what a quantizer makes of it."""
        from benchmarks.peers.onnx_files import float_file

        source, path = float_file(model, size, folder), folder / f"{model}-{variant}.onnx"
        note = "torch.onnx.export"
        if variant == "fp32":
            path = source
        elif model == CNN:
            note = _static(source, path, SIZES[size].image)
        else:
            note = _int4(source, path) if variant == "int4" else _dynamic(source, path)
        return Contender(self.name, model, variant, str(path), path.stat().st_size, note=note)

    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """One session; threads do not spin between calls."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(contender.path, options, ["CPUExecutionProvider"])
        if contender.model == CNN:
            image = images(1, SIZES[size].image)
            return {"image": lambda: session.run(None, {"image": image})[0]}
        return _language_session(session, SIZES[size])


def _language_session(session: Any, size: Size) -> Session:
    text, last = texts(size)
    names = past_names(size)
    start = {"input_ids": text, **_named(names, empty_past(size))}
    _, *past = session.run(None, start)
    step = {"input_ids": last, **_named(names, past)}
    return {
        "prefill": lambda: session.run(None, start)[0],
        "decode": lambda: session.run(None, step)[0],
    }


def _named(names: list[str], arrays: list[Array]) -> dict[str, Array]:
    return dict(zip(names, arrays, strict=True))


def _int4(source: Path, path: Path) -> str:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    made = nbits.MatMulNBitsQuantizer(
        onnx.load(str(source)),
        bits=4,
        block_size=32,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=("MatMul", "Gather"),
    )
    made.process()
    made.model.save_model_to_file(str(path), False)
    return "MatMulNBitsQuantizer, block 32, symmetric, accuracy_level 4, embedding too"


def _dynamic(source: Path, path: Path) -> str:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8, per_channel=True)
    return "quantize_dynamic, QInt8 per channel"


def _static(source: Path, path: Path, image: int) -> str:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """16 images, one at a time."""

        def __init__(self) -> None:
            self.images: Iterator[Array] = iter(images(16, image))

        def get_next(self) -> dict[str, Array] | None:
            """The next one; None at the end."""
            found = next(self.images, None)
            return None if found is None else {"image": found[None]}

    quantize_static(str(source), str(path), Reader(), per_channel=True)
    return "quantize_static, QDQ, per channel"
