"""OpenVINO, from the ONNX files: fp32, and NNCF's int8 and int4 (groups of 32, embedding and head too).

Quantized forms are compiled with its defaults, which on a CPU that has it means bfloat16 arithmetic in what
is not quantized, and int8 activations around compressed weights; fp32 is told to stay in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from benchmarks.contender import CNN, LM, Contender, Runtime, Session
from benchmarks.inputs import SIZES, Size, empty_past, images, past_names, texts


class OpenVINO(Runtime):
    """IR files on the CPU plugin; past keys and values go in with each call, by reference."""

    name = "openvino"
    packages = ("openvino", "nncf", "onnx", "onnxscript")
    variants: ClassVar = {LM: ("fp32", "int8", "int4"), CNN: ("fp32", "int8")}

    def build(self, model: str, variant: str, size: str, folder: Path) -> Contender:
        """Convert the ONNX file, compress, save."""
        import openvino

        from benchmarks.peers.onnx_files import float_file

        network, note = openvino.convert_model(float_file(model, size, folder)), "convert_model"
        if variant != "fp32":
            network, note = _quantized(network, model, variant, size)
        path = folder / f"{model}-{variant}.xml"
        openvino.save_model(network, path, compress_to_fp16=False)
        stored = path.stat().st_size + path.with_suffix(".bin").stat().st_size
        return Contender(self.name, model, variant, str(path), stored, note=note)

    def imports(self) -> None:
        """Without NNCF, which only builds."""
        import openvino  # noqa: F401

    def open(self, contender: Contender, size: str, threads: int) -> Session:
        """Compile for latency; an answer is a view into the runtime's memory."""
        import openvino

        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if contender.variant == "fp32":
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(contender.path, "CPU", properties)
        request = compiled.create_infer_request()

        def run(given: dict[str, Any]) -> Any:
            return request.infer(given, share_inputs=True, share_outputs=True)

        if contender.model == CNN:
            image = {"image": images(1, SIZES[size].image)}
            return {"image": lambda: run(image)[0]}
        return _language_session(run, SIZES[size])


def _language_session(run: Any, size: Size) -> Session:
    text, last = texts(size)
    names = past_names(size)
    start = {"input_ids": text, **dict(zip(names, empty_past(size), strict=True))}
    answer = run(start)
    step = {"input_ids": last, **{n: answer[i].copy() for i, n in enumerate(names, 1)}}
    return {"prefill": lambda: run(start)[0], "decode": lambda: run(step)[0]}


def _quantized(network: Any, model: str, variant: str, size: str) -> tuple[Any, str]:
    import nncf

    if model == CNN:
        data = nncf.Dataset([image[None] for image in images(16, SIZES[size].image)])
        return nncf.quantize(network, data, subset_size=16), "nncf.quantize, 16 images"
    mode = nncf.CompressWeightsMode
    if variant == "int8":
        return nncf.compress_weights(network, mode=mode.INT8_SYM), "nncf.compress_weights INT8_SYM"
    made = nncf.compress_weights(network, mode=mode.INT4_SYM, group_size=32, ratio=1.0, all_layers=True)
    return made, "nncf.compress_weights INT4_SYM, groups of 32, all layers"
