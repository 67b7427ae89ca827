"""What is read from the code of a package."""

from __future__ import annotations

import zipfile
from pathlib import Path

from qaware.exporters.int8_kernels import kernels

CODE = """
    constants_info_[0].dtype = cached_torch_dtype_float32;
    constants_info_[0].device_type = cached_torch_device_type_cpu;
    constants_info_[0].offset = 0;
    constants_info_[0].data_size = 64;
    constants_info_[1].dtype = cached_torch_dtype_int8;
    constants_info_[1].device_type = cached_torch_device_type_cpu;
    constants_info_[1].offset = 0;
    constants_info_[1].data_size = 400;
    constants_info_[2].dtype = cached_torch_dtype_float32;
    constants_info_[2].device_type = cached_torch_device_type_cpu;
    constants_info_[2].offset = 0;
    constants_info_[2].data_size = 36;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__qconv_pointwise_tensor(a, b));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__qconv_pointwise_tensor(a, b));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__qlinear_pointwise_tensor(a, b));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(a, b));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(a, b));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_cumsum(a, b));
"""


def test_calls_and_constants_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/abc.wrapper.cpp", CODE)
        archive.writestr("model/data/aotinductor/model/abc.kernel.cpp", "aoti_torch_cpu_convolution(")
    found = kernels(path)
    assert found.int8 == {"qconv": 2, "qlinear": 1}
    assert found.floating == {"convolution": 1, "addmm_out": 1}
    assert found.constants == {"float32": 100, "int8": 400}
