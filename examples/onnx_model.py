"""MODEL=examples.onnx_model:Graph uvicorn server:app -- a graph in ONNX Runtime, its path by MODEL_ARGS='{"path": "my.onnx"}'.

$ pip install onnx onnxruntime
$ curl --json '{"inputs": [1.0, -2.0, 3.0]}' http://127.0.0.1:8000/
[1.0,0.0,3.0]
"""

from typing import Any

import numpy as np
import onnxruntime


class Graph:
    """A vector in, the graph's vector out. Its first axis must be free: that is the batch."""

    example = (1.0, -2.0, 3.0)
    input_rank = 1

    def __init__(self, path: str = "") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # or its threads fight for the cores with other instances'
        self.session = onnxruntime.InferenceSession(path or relu(), options)
        self.name, self.width = self.session.get_inputs()[0].name, self.session.get_inputs()[0].shape[1]

    def check(self, inputs: Any, parameters: dict[str, Any]) -> np.ndarray:
        row = np.asarray(inputs, np.float32)
        if row.shape != (self.width,):
            raise ValueError(f"send a list of {self.width} numbers")
        return row

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.session.run(None, {self.name: np.stack(inputs)})[0])


def relu() -> bytes:
    """The smallest graph that does something; yours comes from `torch.onnx.export(…, dynamo=True)`, for one."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    return helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]
    ).SerializeToString()
