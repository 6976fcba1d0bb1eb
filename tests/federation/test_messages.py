"""Wire messages: round trips, everything malformed, and what check() says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import save

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.messages import (
    Manifest,
    Message,
    TensorLayout,
    as_decoded,
    check,
    decode,
    encode,
    flatten,
    hash_tensors,
    unflatten,
)

MANIFEST = Manifest("update", "run", 3, "north", "0123456789abcdef", 20, "fp32", False, {"loss": 0.25, "seconds": 2})


def tensors_of(**floats):
    values = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=floats)
    return st.dictionaries(st.text(min_size=1, max_size=8).map("x".__add__), values.map(torch.from_numpy), max_size=4)


def wide(largest, **more):
    return {"min_value": -largest, "max_value": largest, **more}


def blob(tensors, **manifest):
    content = {**vars(MANIFEST), **manifest}
    return save(tensors, metadata={"manifest": json.dumps(content)})


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype == torch.float32
        assert left[name].shape == right[name].shape
        assert left[name].numpy().tobytes() == right[name].numpy().tobytes()


class TestRoundTrip:
    @given(tensors_of())
    def test_fp32_returns_every_bit(self, tensors):
        message = decode(encode(MANIFEST, tensors))

        assert message.manifest == MANIFEST
        assert_same(message.tensors, tensors)
        assert_same(as_decoded(tensors, "fp32"), tensors)

    @given(tensors_of(**wide(65504)))
    def test_fp16_returns_the_half_precision_value(self, tensors):
        message = decode(encode(replace(MANIFEST, dtype="fp16"), tensors))

        assert_same(message.tensors, {name: tensor.half().float() for name, tensor in tensors.items()})
        assert_same(as_decoded(tensors, "fp16"), message.tensors)

    @given(tensors_of(**wide(2.0**100, allow_subnormal=False)))
    def test_int8_errs_by_half_a_scale_at_most(self, tensors):
        message = decode(encode(replace(MANIFEST, dtype="int8"), tensors))

        assert_same(as_decoded(tensors, "int8"), message.tensors)
        for name, tensor in tensors.items():
            if tensor.numel():
                bound = tensor.abs().max().double() / 127 * 0.5001 + 1e-35
                assert (message.tensors[name].double() - tensor.double()).abs().max() <= bound

    def test_int8_takes_whole_multiples_of_the_scale_as_they_are_and_zeros_as_zeros(self):
        tensors = {"a": torch.tensor([-127.0, 3.0, 127.0]), "b": torch.zeros(2)}

        assert_same(decode(encode(replace(MANIFEST, dtype="int8"), tensors)).tensors, tensors)

    @pytest.mark.parametrize(("dtype", "values"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
    def test_a_value_takes_its_dtypes_bytes(self, dtype, values):
        short, long = (len(encode(replace(MANIFEST, dtype=dtype), {"x": torch.zeros(n)})) for n in (10_000, 90_000))

        assert long - short == pytest.approx(80_000 * values, abs=16)

    def test_no_tensors_at_all_is_a_message(self):
        assert decode(encode(MANIFEST, {})).tensors == {}

    def test_the_bytes_do_not_depend_on_the_order_of_the_tensors(self):
        a, b = torch.ones(2), torch.zeros(3)

        assert encode(MANIFEST, {"a": a, "b": b}) == encode(MANIFEST, {"b": b, "a": a})

    def test_views_of_one_vector_parameters_and_transposes_travel(self):
        vector = torch.arange(6.0)
        tensors = {"a": vector[:2], "b": vector[2:], "c": vector.reshape(2, 3).T, "d": torch.nn.Parameter(vector)}

        decoded = decode(encode(MANIFEST, tensors)).tensors

        assert decoded["c"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert decoded["b"].tolist() == [2, 3, 4, 5]
        assert decoded["d"].tolist() == vector.tolist()

    def test_nan_travels_in_floats_so_that_the_server_can_say_who_sent_it(self):
        sent = {"x": torch.tensor([torch.nan, 1.0])}

        assert decode(encode(replace(MANIFEST, dtype="fp16"), sent)).tensors["x"].isnan().tolist() == [True, False]


class TestWhatCannotBeSent:
    @pytest.mark.parametrize("value", [65505.0, -1e6, torch.inf])
    def test_fp16_overflow_names_the_tensor(self, value):
        with pytest.raises(MessageError, match=r"blocks\.3\.up.*65504.*fp32"):
            encode(replace(MANIFEST, dtype="fp16"), {"blocks.3.up": torch.tensor([0.0, value])})

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_int8_of_a_value_that_is_not_finite_names_the_tensor(self, value):
        with pytest.raises(MessageError, match=r"blocks\.3\.up"):
            as_decoded({"blocks.3.up": torch.tensor([1.0, value])}, "int8")


class TestMalformed:
    @given(st.binary(max_size=200))
    def test_random_bytes_are_refused(self, data):
        with pytest.raises(MessageError):
            decode(data)

    @given(st.data())
    def test_a_cut_message_is_refused(self, data):
        whole = encode(MANIFEST, {"x": torch.ones(5)})

        with pytest.raises(MessageError):
            decode(whole[: data.draw(st.integers(0, len(whole) - 1))])

    def test_no_manifest_is_refused(self):
        for metadata in (None, {"other": "1"}):
            with pytest.raises(MessageError, match="no manifest"):
                decode(save({"x": torch.ones(1)}, metadata=metadata))

    @pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"kind": "update"}'])
    def test_a_manifest_that_is_not_one_is_refused(self, text):
        with pytest.raises(MessageError, match="manifest"):
            decode(save({}, metadata={"manifest": text}))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("kind", "other"),
            ("dtype", "fp64"),
            ("round", "3"),
            ("round", 1.5),
            ("samples", None),
            ("relative", 1),
            ("metrics", {"loss": "low"}),
            ("surprise", 1),
        ],
    )
    def test_a_wrong_manifest_field_is_named(self, field, value):
        with pytest.raises(MessageError, match=field):
            decode(blob({}, **{field: value}))

    @pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
    def test_tensors_of_another_dtype_than_the_manifest_says_are_refused(self, dtype):
        with pytest.raises(MessageError, match="x: dtype"):
            decode(blob({"x": torch.ones(2, dtype=torch.float64)}, dtype=dtype))
        with pytest.raises(MessageError, match="x: dtype"):
            decode(blob({"x": torch.ones(2, dtype=torch.int8 if dtype == "fp16" else torch.float16)}, dtype=dtype))

    def test_a_missing_scale_is_refused(self):
        with pytest.raises(MessageError, match="x: its int8 scale is missing"):
            decode(blob({"x": torch.ones(2, dtype=torch.int8)}, dtype="int8"))

    def test_a_scale_without_a_tensor_is_refused(self):
        with pytest.raises(MessageError, match="without a tensor"):
            decode(blob({"x::scale": torch.ones(())}, dtype="int8"))

    @pytest.mark.parametrize(
        "scale", [torch.tensor(-1.0), torch.tensor(torch.nan), torch.tensor(torch.inf), torch.ones(2)]
    )
    def test_a_senseless_scale_is_refused(self, scale):
        with pytest.raises(MessageError, match="x: its int8 scale"):
            decode(blob({"x": torch.ones(2, dtype=torch.int8), "x::scale": scale}, dtype="int8"))

    def test_a_message_over_the_limit_is_refused_and_one_at_it_is_not(self):
        data = encode(MANIFEST, {"x": torch.ones(5)})

        assert decode(data, max_bytes=len(data)).manifest == MANIFEST
        with pytest.raises(MessageError, match="larger than"):
            decode(data, max_bytes=len(data) - 1)


class TestCheck:
    expected: ClassVar = {
        "kind": "update",
        "run": "run",
        "round": 3,
        "site": "north",
        "base_hash": "0123456789abcdef",
        "shapes": {"x": (2, 3)},
    }
    tensors: ClassVar = {"x": torch.zeros(2, 3)}

    def test_what_was_expected_passes(self):
        message = decode(encode(MANIFEST, self.tensors))

        check(message, **self.expected)
        check(message, **{**self.expected, "base_hash": None})

    @pytest.mark.parametrize(
        ("manifest", "said"),
        [
            ({"kind": "aggregate"}, "kind is 'aggregate', expected 'update'"),
            ({"run": "old"}, "run is 'old'"),
            ({"round": 2}, "round is 2, expected 3"),
            ({"site": "south"}, "site is 'south', expected 'north'"),
            ({"base_hash": "f" * 16}, "base hash is 'ffff"),
            ({"samples": 0}, "sample count 0 is below 1"),
        ],
    )
    def test_a_differing_manifest_is_named(self, manifest, said):
        with pytest.raises(MessageError, match=said):
            check(Message(replace(MANIFEST, **manifest), self.tensors), **self.expected)

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({}, "missing tensors: x"),
            ({"x": torch.zeros(2, 3), "y": torch.zeros(1)}, "unexpected tensors: y"),
            ({"x": torch.zeros(3, 2)}, r"shape of x is \(3, 2\), expected \(2, 3\)"),
        ],
    )
    def test_differing_tensors_are_named(self, tensors, said):
        with pytest.raises(MessageError, match=f"site north, round 3, update: .*{said}"):
            check(Message(MANIFEST, tensors), **self.expected)

    def test_an_aggregate_needs_no_samples(self):
        message = Message(replace(MANIFEST, kind="aggregate", samples=0), self.tensors)

        check(message, **{**self.expected, "kind": "aggregate"})

    def test_all_that_differs_is_said_at_once(self):
        with pytest.raises(MessageError, match=r"round is 9.*missing tensors"):
            check(Message(replace(MANIFEST, round=9), {}), **self.expected)


class TestHash:
    @given(tensors_of())
    def test_it_is_16_digits_whatever_the_order(self, tensors):
        digits = hash_tensors(tensors)

        assert len(digits) == 16
        assert int(digits, 16) >= 0
        assert hash_tensors(dict(reversed(tensors.items()))) == digits

    @pytest.mark.parametrize(
        "other",
        [
            {"a": torch.zeros(2, 3), "b": torch.tensor([0.0, 1e-45])},
            {"a": torch.zeros(3, 2), "b": torch.zeros(2)},
            {"a": torch.zeros(2, 3), "c": torch.zeros(2)},
            {"a": torch.zeros(2, 3)},
            {},
        ],
    )
    def test_values_shapes_and_names_all_count(self, other):
        assert hash_tensors({"a": torch.zeros(2, 3), "b": torch.zeros(2)}) != hash_tensors(other)

    def test_what_survives_the_wire_keeps_its_hash(self):
        sent = {"a": torch.randn(3, 4), "b": torch.randn(5)}
        base = as_decoded(sent, "fp16")

        assert hash_tensors(decode(encode(replace(MANIFEST, dtype="fp16"), sent)).tensors) == hash_tensors(base)


class TestFlat:
    shapes: ClassVar = {"a": (2, 2), "b": (), "c": (0, 3)}

    def test_flatten_follows_the_names_and_unflatten_undoes_it(self):
        tensors = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(5.0), "c": torch.zeros(0, 3)}

        vector = flatten(tensors, ["b", "c", "a"])

        assert vector.tolist() == [5, 1, 2, 3, 4]
        assert_same(unflatten(vector, ["b", "c", "a"], self.shapes), tensors)

    def test_no_names_make_an_empty_vector(self):
        vector = flatten({"a": torch.ones(2)}, ())

        assert vector.shape == (0,)
        assert vector.dtype == torch.float32
        assert unflatten(vector, (), {}) == {}

    def test_the_tensors_and_the_vector_have_their_own_memory(self):
        source = {"a": torch.ones(2, 2)}
        vector = flatten(source, ["a"])
        cut = unflatten(vector, ["a"], self.shapes)

        vector.zero_()

        assert source["a"].sum() == 4
        assert cut["a"].sum() == 4

    def test_a_vector_of_another_length_is_refused(self):
        with pytest.raises(MessageError, match="3 values do not fill"):
            unflatten(torch.zeros(3), ["a"], self.shapes)


class TestTensorLayout:
    layout = TensorLayout((("b0.x", "b0.y"), ("b1.x",)), ("d",), {"b0.x": (2, 3), "b0.y": (3,), "b1.x": (4,), "d": ()})

    def test_adapters_come_in_the_order_of_the_blocks(self):
        assert self.layout.adapters == ("b0.x", "b0.y", "b1.x")

    def test_size_counts_values(self):
        assert self.layout.size(self.layout.adapters) == 13
        assert self.layout.size(self.layout.decoder) == 1
        assert self.layout.size(()) == 0
