"""The Open Inference Protocol v2 on the wire: one JSON object, with tensors in it or behind it.

Knows the protocol's fields and bytes. Does not know routes, versions or models: images come out
of a request as pixels or still encoded, and go into the answer as class names and probabilities.

Sources: open-inference-protocol, inference_rest.md; Triton's binary tensor data extension, which
its clients use unless told otherwise.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lifelong_ray.on_ray.http import RequestError
from lifelong_ray.types import Pixels

HEADER_LENGTH = "inference-header-content-length"
"""Of the JSON object, where binary tensors follow it; of requests and answers."""

EXTENSIONS = ("binary_tensor_data",)
INPUT, PROBABILITIES, CLASS = "image", "probabilities", "class"
_OUTPUTS = (PROBABILITIES, CLASS)
_MOST_DIGITS = 18  # Of a length in bytes.


@dataclass(frozen=True)
class InferRequest:
    """What a client asks.

    Attributes:
        request_id: The client's own, which the answer repeats; may be empty.
        images: Pixels (height, width, 1 or 3), or the bytes of encoded images.
        outputs: Names of the tensors wanted, and whether each is to be binary.
    """

    request_id: str
    images: tuple[Pixels | bytes, ...]
    outputs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class InferAnswer:
    """What a client is told.

    Attributes:
        model_name: As in the path.
        version: That answered all of it.
        class_names: The most probable class of each image.
        probabilities: Of all classes, for each image; as many for each.
        parameters: Told beside them.
    """

    model_name: str
    version: str
    class_names: Sequence[str]
    probabilities: Sequence[Sequence[float]]
    parameters: Mapping[str, str]


def decompressed(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """Return the body as it was before ``Content-Encoding``.

    Raises:
        RequestError: If the encoding is unknown, the body is none of it, or it becomes too large.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise RequestError(
            415,
            "unsupported_encoding",
            f"content-encoding {encoding!r:.80} is not known; send gzip, deflate or none",
        )
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # Finds out which of the two it is.
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise RequestError(400, "bad_encoding", f"the body is not {encoding}: {error}") from None
    if len(plain) > max_bytes:
        raise RequestError(413, "body_too_large", f"the body becomes larger than {max_bytes} bytes")
    if stream.unused_data:
        raise RequestError(400, "bad_encoding", f"something follows the end of the {encoding} body")
    if not stream.eof:
        raise RequestError(400, "bad_encoding", f"the {encoding} body is cut short")
    return plain


def read_request(body: bytes, header_length: str | None, *, max_images: int) -> InferRequest:
    """Read an inference request.

    Args:
        body: All of it, decompressed.
        header_length: Value of `HEADER_LENGTH`; None where everything is JSON.
        max_images: More of them are refused.

    Raises:
        RequestError: If it is not a request for one tensor of images.
    """
    request, binary = _split(body, header_length)
    request_id = request.get("id", "")
    if not isinstance(request_id, str) or not request_id.isascii():
        raise RequestError(400, "bad_id", "id must be a string of ASCII characters")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(400, "bad_inputs", "inputs must be a list with one tensor")
    tensor = inputs[0]
    data = _binary_of(tensor, binary)
    datatype = tensor.get("datatype")
    if datatype == "UINT8":
        images: tuple[Pixels | bytes, ...] = _pixels(tensor, data, max_images)
    elif datatype == "BYTES":
        images = _encoded(tensor, data, max_images)
    else:
        raise RequestError(
            400,
            "bad_datatype",
            f"datatype is {datatype!r:.80}; images are UINT8 pixels, or BYTES of encoded images",
        )
    return InferRequest(request_id, images, _wanted(request))


def write_answer(request: InferRequest, answer: InferAnswer) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer, and its headers."""
    made = {
        PROBABILITIES: np.asarray(answer.probabilities, np.float32),
        CLASS: np.asarray([name.encode() for name in answer.class_names], dtype=object),
    }
    outputs, blobs = [], []
    for name, is_binary in request.outputs:
        values = made[name]
        output: dict[str, Any] = {
            "name": name,
            "datatype": "FP32" if name == PROBABILITIES else "BYTES",
            "shape": list(values.shape),
        }
        if is_binary:
            blob = values.tobytes() if name == PROBABILITIES else _with_lengths(values.tolist())
            output["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        elif name == PROBABILITIES:
            output["data"] = [round(float(p), 6) for p in values.ravel()]
        else:
            output["data"] = list(answer.class_names)
        outputs.append(output)
    head = json.dumps(
        {
            "model_name": answer.model_name,
            "model_version": answer.version,
            "id": request.request_id,
            "parameters": dict(answer.parameters),
            "outputs": outputs,
        }
    ).encode()
    if not blobs:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join([head, *blobs]), headers


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes | None]:
    """The JSON object, and what follows it where that is said."""
    length = len(body)
    if header_length is not None:
        # Python makes no number of thousands of digits.
        is_length = header_length.isdecimal() and len(header_length) <= _MOST_DIGITS
        if not is_length or int(header_length) > len(body):
            raise RequestError(
                400,
                "bad_header_length",
                f"{HEADER_LENGTH} is {header_length!r:.40}, but the body has {len(body)} bytes",
            )
        length = int(header_length)
    try:
        request = json.loads(body[:length] or b"{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "not_json", f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RequestError(
            400, "not_json", f"the request is a JSON {type(request).__name__}, not an object"
        )
    return request, None if header_length is None else body[length:]


def _binary_of(tensor: dict[str, Any], binary: bytes | None) -> bytes | None:
    """The tensor's binary data; None where it is JSON."""
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size != len(binary or b""):
        raise RequestError(
            400,
            "bad_tensor",
            f"binary_data_size is {size!r:.40}, but {len(binary or b'')} bytes follow the JSON; "
            f"{HEADER_LENGTH} says where it ends",
        )
    return binary or b""


def _wanted(request: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    """The outputs asked for, all of them where none is named."""
    parameters = request.get("parameters")
    by_default = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    outputs = request.get("outputs")
    if not outputs:
        return tuple((name, by_default) for name in _OUTPUTS)
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise RequestError(400, "bad_outputs", "outputs must be a list of objects with names")
    wanted: list[tuple[str, bool]] = []
    for output in outputs:
        name, its = output.get("name"), output.get("parameters")
        if name not in _OUTPUTS:
            raise RequestError(
                400, "unknown_output", f"no output {name!r:.80}; there are {', '.join(_OUTPUTS)}"
            )
        if any(name == known for known, _ in wanted):
            # A small request could ask for an answer of any size.
            raise RequestError(400, "bad_outputs", f"the output {name!r} is asked for twice")
        choice = its.get("binary_data", by_default) if isinstance(its, dict) else by_default
        wanted.append((name, choice is True))
    return tuple(wanted)


def _pixels(tensor: dict[str, Any], data: bytes | None, max_images: int) -> tuple[Pixels, ...]:
    """Images of one UINT8 tensor (N, height, width, 1 or 3)."""
    shape = _shape(tensor, max_images)
    if len(shape) != 4 or shape[3] not in (1, 3):
        raise RequestError(400, "bad_shape", f"shape {shape} is not (N, height, width, 1 or 3)")
    count = int(np.prod(shape, dtype=object))
    if data is not None:
        if len(data) != count:
            raise RequestError(
                400, "bad_tensor", f"shape {shape} has {count} values, and {len(data)} bytes came"
            )
        return tuple(np.frombuffer(data, np.uint8).reshape(shape))
    try:
        # As objects first: numpy would turn "5" and 1.7 into integers, and where it may choose
        # the type itself, one long string among the numbers would make all of them as wide.
        array = np.asarray(tensor["data"], dtype=object)
        unfit = set(map(type, array.ravel().tolist())) - {int, float}
        if unfit:
            names = ", ".join(sorted(kind.__name__ for kind in unfit))
            raise RequestError(400, "bad_tensor", f"data holds {names}; UINT8 takes numbers")
        array = array.astype(np.float64).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(400, "bad_tensor", f"data does not fit shape {shape}: {error}") from None
    pixels = np.clip(np.nan_to_num(array), 0, 255).astype(np.uint8)
    if (pixels != array).any():
        raise RequestError(400, "bad_tensor", "UINT8 values are whole numbers from 0 to 255")
    return tuple(pixels)


def _encoded(tensor: dict[str, Any], data: bytes | None, max_images: int) -> tuple[bytes, ...]:
    """Encoded images of one BYTES tensor (N,) or (N, 1); in JSON as base64."""
    shape = _shape(tensor, max_images)
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
        raise RequestError(400, "bad_shape", f"shape {shape} of BYTES is not (N) or (N, 1)")
    if data is not None:
        images = _without_lengths(data)
    else:
        values = tensor.get("data")
        flat = np.asarray(values, dtype=object).ravel().tolist() if values is not None else []
        if not all(isinstance(value, str) for value in flat):
            raise RequestError(400, "bad_tensor", "data of BYTES in JSON are base64 strings")
        try:
            images = [base64.b64decode(value, validate=True) for value in flat]
        except (binascii.Error, ValueError) as error:
            raise RequestError(
                400, "bad_tensor", f"data of BYTES in JSON are base64 strings: {error}"
            ) from None
    if len(images) != shape[0]:
        raise RequestError(
            400, "bad_tensor", f"shape {shape} has {shape[0]} elements, and {len(images)} came"
        )
    return tuple(images)


def _shape(tensor: dict[str, Any], max_images: int) -> list[int]:
    """The tensor's shape, of no more images than may be sent."""
    shape = tensor.get("shape")
    sizes = shape if isinstance(shape, list | tuple) else []
    if not sizes or not all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes
    ):
        raise RequestError(
            400, "bad_shape", f"shape {shape!r:.80} is not a list of whole numbers above 0"
        )
    if sizes[0] > max_images:
        raise RequestError(
            413, "too_many_images", f"{sizes[0]} images in one request; at most {max_images}"
        )
    return list(sizes)


def _with_lengths(elements: Sequence[bytes]) -> bytes:
    """Elements of a BYTES tensor, each behind its length as a little-endian uint32."""
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def _without_lengths(data: bytes) -> list[bytes]:
    elements, place = [], 0
    while place < len(data):
        if place + 4 > len(data):
            raise RequestError(400, "bad_tensor", "BYTES data ends within an element's length")
        (length,) = struct.unpack_from("<I", data, place)
        place += 4
        if place + length > len(data):
            raise RequestError(
                400,
                "bad_tensor",
                f"an element of BYTES data says {length} bytes, and {len(data) - place} are left",
            )
        elements.append(data[place : place + length])
        place += length
    return elements
