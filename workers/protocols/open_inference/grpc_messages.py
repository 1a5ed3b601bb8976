"""The protocol's messages in gRPC: what they say, the replies to them, and how a call's failure reads."""

from typing import Any, NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import RetryInfo

# The protocol's messages, as its clients have them: two sets of the same names in one process would collide.
from tritonclient.grpc import service_pb2 as pb

from workers.errors import Malformed, Unprocessable
from workers.protocols.open_inference import tensors
from workers.protocols.open_inference.tensors import ANSWER, VERSION, Output, Tensor
from workers.service import Service

# Of 503 see `InferenceServicer.failure`; any other is INVALID_ARGUMENT.
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
CONTENTS = {  # the field with a tensor's elements, where they are not in raw_input_contents
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


class Status(NamedTuple):
    """The gRPC status of a failed call."""

    code: grpc.StatusCode
    sentence: str
    retry_after_s: int = 0

    def details(self) -> tuple[tuple[str, bytes], ...]:
        """Return when to retry, in the metadata where client libraries look for it."""
        if not self.retry_after_s:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.sentence)
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=self.retry_after_s)))
        return (("grpc-status-details-bin", status.SerializeToString()),)


def parsed(raw: bytes, kind: type[Any]) -> Any:
    """Return the message. Raises Malformed with a sentence."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise Malformed(f"the message is not a valid {kind.DESCRIPTOR.full_name}; send one") from None


def prepared(request: Any, service: Service) -> tuple[list[Any], dict[str, Any], float]:
    """Return the task's inputs and parameters, and how long the request may take. Raises Malformed or Unprocessable."""
    fields = {
        name: getattr(p, p.WhichOneof("parameter_choice") or "", None)
        for name, p in request.parameters.items()
    }
    for output in request.outputs:
        tensors.check_output(output.name, output.parameters)
    limit_s = tensors.time_limit_s(fields, service)
    return tensors.inputs(the_input(request), service), tensors.parameters(fields), limit_s


def the_input(request: Any) -> Tensor:
    """Return the request's one tensor."""
    if len(request.inputs) != 1 or len(request.raw_input_contents) > 1:
        raise Malformed(f"there are {len(request.inputs)} inputs; send one tensor")
    tensor = request.inputs[0]
    if tensor.parameters:
        raise Malformed("the tensor has parameters; leave them out, shared memory too")
    if not all(0 <= one < 2**31 for one in tensor.shape):
        raise Malformed("the shape must have whole numbers of at least 0")
    data: Any = request.raw_input_contents[0] if request.raw_input_contents else None
    if data is None:
        if tensor.datatype not in CONTENTS:
            raise Unprocessable(
                f"{tensor.datatype[:20]} is not a known datatype, or must be in raw_input_contents"
            )
        data = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
    return Tensor(tensor.name, tensor.datatype, list(tensor.shape), data)


def reply_to(request: Any, output: Output, **parameters: Any) -> Any:
    """Return the reply with this tensor."""
    return pb.ModelInferResponse(
        model_name=request.model_name,
        model_version=VERSION,
        id=request.id,
        parameters=parameters,
        outputs=[{"name": ANSWER, "datatype": output.datatype, "shape": output.shape}],
        raw_output_contents=[output.raw],
    )


def error_to(request: Any, status: Status) -> Any:
    """Return the message of a stream that says why this request of it failed."""
    # Triton clients show only the message of an error.
    sentence = f"request {request.id}: {status.sentence}" if request.id else status.sentence
    fields = {"status": pb.InferParameter(string_param=status.code.name)}
    if status.retry_after_s:
        fields["retry_after_s"] = pb.InferParameter(int64_param=status.retry_after_s)
    response = pb.ModelInferResponse(id=request.id, model_name=request.model_name, parameters=fields)
    return pb.ModelStreamInferResponse(error_message=sentence, infer_response=response)
