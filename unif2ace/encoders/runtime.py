"""ONNX networks on ONNX Runtime: opened on the device asked for, and on no other."""

from __future__ import annotations

from pathlib import Path

import torch

from unif2ace.errors import UserError
from unif2ace.parsing import reading


def providers(device: torch.device) -> list:
    """What ONNX Runtime calls the device.

    Raises:
        UserError: ONNX Runtime is not installed, or not for that device.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("this encoder needs ONNX Runtime: pip install 'unif2ace[faces]'") from error
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
    raise UserError(f"ONNX Runtime does not run on {device} here: install onnxruntime-gpu, or take device='cpu'")


def session(path: Path, device: torch.device):
    """An InferenceSession of the network in `path`.

    Raises:
        UserError: see `providers`; or the file is damaged.
    """
    runs_on = providers(device)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with reading(path, "ONNX network"):
        return onnxruntime.InferenceSession(str(path), options, providers=runs_on)
