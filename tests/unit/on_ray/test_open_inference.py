from __future__ import annotations

import base64
import gzip
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong_ray.on_ray.http import RequestError
from lifelong_ray.on_ray.open_inference import (
    HEADER_LENGTH,
    InferAnswer,
    InferRequest,
    decompressed,
    read_request,
    write_answer,
)

PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1)
ANSWER = InferAnswer("m", "v1", ("ä", "b"), ((0.75, 0.25), (0.125, 0.875)), {"variant": "stable"})


def tensor(
    data: object, shape: object = (1, 1, 2, 1), datatype: str = "UINT8"
) -> dict[str, object]:
    return {"name": "image", "datatype": datatype, "shape": shape, "data": data}


def read(body: object, max_images: int = 8) -> InferRequest:
    return read_request(json.dumps(body).encode(), None, max_images=max_images)


def refused(body: bytes | object, header_length: str | None = None) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        read_request(raw, header_length, max_images=8)
    assert str(caught.value).isprintable()
    return caught.value


def in_binary(tensor: dict[str, object], data: bytes, **more: object) -> tuple[bytes, str]:
    its = {**tensor, "parameters": {"binary_data_size": len(data)}}
    del its["data"]
    head = json.dumps({"inputs": [its], **more}).encode()
    return head + data, str(len(head))


# ---------------------------------------------------------------- UINT8


@pytest.mark.parametrize("data", [[0, 255], [0.0, 255.0], [[[[0], [255]]]]], ids=repr)
def test_whole_numbers_of_a_tensor_are_taken_flat_or_nested(data: object) -> None:
    [image] = read({"inputs": [tensor(data)]}).images

    np.testing.assert_array_equal(image, np.array([[[0], [255]]], np.uint8), strict=True)


@pytest.mark.parametrize(
    "data",
    [
        [1.7, 2],
        ["5", 2],
        ["x" * 100_000, *range(100_000)],
        [True, 2],
        [None, 2],
        [[1], [2, 3]],
        [256, 2],
        [-1, 2],
        [float("nan"), 2],
        [float("inf"), 2],
        [10**400, 2],
        [1, 2, 3],
        "ab",
        {"0": 1},
        None,
    ],
    ids=lambda data: f"{data!r:.20}",
)
def test_what_is_no_pixel_is_refused_and_not_cut_down_to_one(data: object) -> None:
    error = refused({"inputs": [tensor(data)]})

    assert (error.status, error.code) == (400, "bad_tensor")


@pytest.mark.parametrize(
    "shape",
    [None, [], [2], [1, 1, 1, 2], [1, 0, 2, 1], [True, 1, 2, 1], "\ud800", [10**30], {}, [1.0]],
    ids=repr,
)
def test_a_shape_that_is_no_batch_of_images_is_refused(shape: object) -> None:
    assert refused({"inputs": [tensor([1, 2], shape)]}).status in (400, 413)


def test_more_images_than_may_be_sent_are_refused_before_they_are_read() -> None:
    assert refused({"inputs": [tensor([], [9, 1, 1, 1])]}).status == 413


def test_pixels_may_follow_the_json_as_they_are() -> None:
    body, length = in_binary(tensor([], list(PIXELS.shape)), PIXELS.tobytes())

    images = read_request(body, length, max_images=8).images

    np.testing.assert_array_equal(np.stack(images), PIXELS, strict=True)


# ---------------------------------------------------------------- BYTES


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.booleans())
def test_encoded_images_come_as_they_were_sent(images: list[bytes], binary: bool) -> None:
    shape = [len(images), 1]
    if binary:
        data = b"".join(struct.pack("<I", len(one)) + one for one in images)
        body, length = in_binary(tensor([], shape, "BYTES"), data)
        request = read_request(body, length, max_images=8)
    else:
        texts = [base64.b64encode(one).decode() for one in images]
        request = read({"inputs": [tensor(texts, shape, "BYTES")]})

    assert list(request.images) == images


@pytest.mark.parametrize(
    "data",
    [b"\x01", b"\x05\x00\x00\x00abc", b"\x01\x00\x00\x00a\x01\x00\x00\x00b", b""],
    ids=["cut in a length", "cut in an element", "one too many", "none"],
)
def test_bytes_that_are_not_as_many_elements_are_refused(data: bytes) -> None:
    body, length = in_binary(tensor([], [1], "BYTES"), data)

    assert refused(body, length).code == "bad_tensor"


@pytest.mark.parametrize("data", [["no base64!"], [1], None, {}, [["YQ=="], ["YQ=="]]], ids=repr)
def test_what_is_no_base64_is_refused(data: object) -> None:
    assert refused({"inputs": [tensor(data, [1], "BYTES")]}).code == "bad_tensor"


# ---------------------------------------------------------------- the request around it


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "not_json"),
        (b"[]", "not_json"),
        (b"\xff", "not_json"),
        (b"[" * 100_000, "not_json"),
        ({"inputs": []}, "bad_inputs"),
        ({"inputs": [tensor([1, 2])] * 2}, "bad_inputs"),
        ({"inputs": {"0": 1}}, "bad_inputs"),
        ({"inputs": [tensor([1, 2], datatype="FP32")]}, "bad_datatype"),
        ({"inputs": [tensor([1, 2])], "id": "ä"}, "bad_id"),
        ({"inputs": [tensor([1, 2])], "outputs": ["class"]}, "bad_outputs"),
        ({"inputs": [tensor([1, 2])], "outputs": [{"name": "logits"}]}, "unknown_output"),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_a_request_that_is_none_is_refused_by_name(body: object, code: str) -> None:
    assert refused(body).code == code


@pytest.mark.parametrize("length", ["-1", "x", "1e2", "10000", "²", "9" * 5_000])
def test_a_header_length_that_is_none_of_the_body_is_refused(length: str) -> None:
    assert refused({"inputs": [tensor([1, 2])]}, length).code == "bad_header_length"


@pytest.mark.parametrize("size", [1, 3, -1, True, "2", 2.0], ids=repr)
def test_a_binary_size_that_is_not_what_follows_is_refused(size: object) -> None:
    its = {**tensor([], [1, 1, 2, 1]), "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [its]}).encode()

    assert refused(head + b"\x01\x02", str(len(head))).code == "bad_tensor"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP ", "identity", ""])
def test_a_compressed_body_is_read(encoding: str) -> None:
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(
        encoding.strip().lower(), lambda data: data
    )

    assert decompressed(packed(b"hello"), encoding, max_bytes=5) == b"hello"


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (gzip.compress(bytes(10_000)), "gzip", 413),
        (b"hello", "gzip", 400),
        (gzip.compress(b"hello")[:-4], "gzip", 400),
        (gzip.compress(b"{}") + gzip.compress(b"{}"), "gzip", 400),
        (b"hello", "br", 415),
    ],
    ids=["too large", "not compressed", "cut short", "more behind", "unknown"],
)
def test_a_compressed_body_is_bounded_and_whole(body: bytes, encoding: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        decompressed(body, encoding, max_bytes=100)

    assert caught.value.status == status


# ---------------------------------------------------------------- the answer


def test_an_answer_in_json_has_both_outputs_and_repeats_the_id() -> None:
    body, headers = write_answer(read({"inputs": [tensor([1, 2])], "id": "mine"}), ANSWER)

    answer = json.loads(body)
    assert headers == {"content-type": "application/json"}
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "m", "v1")
    assert answer["parameters"] == {"variant": "stable"}
    probabilities, classes = answer["outputs"]
    assert (probabilities["shape"], probabilities["data"]) == ([2, 2], [0.75, 0.25, 0.125, 0.875])
    assert (classes["datatype"], classes["shape"], classes["data"]) == ("BYTES", [2], ["ä", "b"])


def test_an_output_is_given_once_however_often_it_is_asked_for() -> None:
    outputs = [{"name": "class"}, {"name": "probabilities"}] * 2

    error = refused({"inputs": [tensor([0, 255])], "outputs": outputs})

    assert (error.status, error.code) == (400, "bad_outputs")


def test_an_answer_in_binary_follows_the_json_in_order() -> None:
    wanted = [
        {"name": "class", "parameters": {"binary_data": True}},
        {"name": "probabilities", "parameters": {"binary_data": True}},
    ]
    body, headers = write_answer(read({"inputs": [tensor([1, 2])], "outputs": wanted}), ANSWER)

    length = int(headers[HEADER_LENGTH])
    classes, probabilities = json.loads(body[:length])["outputs"]
    split = length + classes["parameters"]["binary_data_size"]
    assert body[length:split] == b"\x02\x00\x00\x00\xc3\xa4\x01\x00\x00\x00b"
    assert len(body) - split == probabilities["parameters"]["binary_data_size"]
    np.testing.assert_array_equal(
        np.frombuffer(body[split:], "<f4").reshape(2, 2), np.array(ANSWER.probabilities, "f4")
    )


def test_outputs_are_binary_where_the_request_says_so_for_all() -> None:
    request = {"inputs": [tensor([1, 2])], "parameters": {"binary_data_output": True}}
    one = [{"name": "class", "parameters": {"binary_data": False}}]

    assert read(request).outputs == (("probabilities", True), ("class", True))
    assert read({**request, "outputs": one}).outputs == (("class", False),)
