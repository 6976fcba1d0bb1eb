"""Messages: round trips, malformed messages, and the faults that check() names."""

from __future__ import annotations

import json
import math
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import save

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.messages.codec import (
    TRAVELLING,
    Message,
    as_decoded,
    check,
    decode,
    encode,
    most_bytes,
)
from fedsca_pipeline.federation.messages.manifest import Manifest, PrivacySpent, outline
from fedsca_pipeline.model.layout import TensorLayout, flatten, hash_tensors, unflatten

MANIFEST = Manifest("update", "run", 3, "north", "0123456789abcdef", 20, "fp32", False, {"loss": 0.25, "seconds": 2})


def tensors_of(**floats):
    values = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=floats)
    # No module path holds a colon, and int8 scales are named by two (hypothesis finds that constant by itself).
    names = st.text(min_size=1, max_size=8).filter(lambda text: ":" not in text).map("x".__add__)
    return st.dictionaries(names, values.map(torch.from_numpy), max_size=4)


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

    def test_int8_returns_multiples_of_the_scale_and_zeros_exactly(self):
        tensors = {"a": torch.tensor([-127.0, 3.0, 127.0]), "b": torch.zeros(2)}

        assert_same(decode(encode(replace(MANIFEST, dtype="int8"), tensors)).tensors, tensors)

    @pytest.mark.parametrize(("dtype", "values"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
    def test_a_value_takes_its_dtypes_bytes(self, dtype, values):
        short, long = (len(encode(replace(MANIFEST, dtype=dtype), {"x": torch.zeros(n)})) for n in (10_000, 90_000))

        assert long - short == pytest.approx(80_000 * values, abs=16)

    def test_a_message_can_have_no_tensors(self):
        assert decode(encode(MANIFEST, {})).tensors == {}

    def test_the_bytes_do_not_depend_on_the_order_of_the_tensors(self):
        a, b = torch.ones(2), torch.zeros(3)

        assert encode(MANIFEST, {"a": a, "b": b}) == encode(MANIFEST, {"b": b, "a": a})

    def test_views_parameters_and_transposes_can_be_sent(self):
        vector = torch.arange(6.0)
        tensors = {"a": vector[:2], "b": vector[2:], "c": vector.reshape(2, 3).T, "d": torch.nn.Parameter(vector)}

        decoded = decode(encode(MANIFEST, tensors)).tensors

        assert decoded["c"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert decoded["b"].tolist() == [2, 3, 4, 5]
        assert decoded["d"].tolist() == vector.tolist()

    def test_nan_can_be_sent_in_floats_so_that_the_server_can_name_the_sender(self):
        sent = {"x": torch.tensor([torch.nan, 1.0])}

        assert decode(encode(replace(MANIFEST, dtype="fp16"), sent)).tensors["x"].isnan().tolist() == [True, False]


class TestCompression:
    @given(tensors_of(**wide(65504)), st.sampled_from(["fp32", "fp16", "int8"]))
    def test_compression_changes_no_value_and_gives_the_same_bytes_twice(self, tensors, dtype):
        manifest = replace(MANIFEST, dtype=dtype)

        plain, packed = decode(encode(manifest, tensors, "none")), decode(encode(manifest, tensors, "zstd"))

        assert packed.manifest == plain.manifest == manifest
        assert_same(packed.tensors, plain.tensors)
        assert encode(manifest, tensors, "zstd") == encode(manifest, dict(reversed(tensors.items())), "zstd")

    def test_zeros_and_the_header_compress_to_almost_nothing(self):
        tensors = {f"encoder.layers.{index}.adapter.weight": torch.zeros(1000) for index in range(20)}

        assert len(encode(MANIFEST, tensors, "zstd")) < len(encode(MANIFEST, tensors, "none")) / 50

    @given(tensors_of(), st.data())
    def test_a_cut_frame_is_refused(self, tensors, data):
        whole = encode(MANIFEST, tensors, "zstd")

        with pytest.raises(MessageError):
            decode(whole[: data.draw(st.integers(0, len(whole) - 1))])

    @given(st.binary(max_size=200))
    def test_garbage_after_a_frame_s_header_is_refused(self, garbage):
        with pytest.raises(MessageError):
            decode(zstandard.FRAME_HEADER + garbage)

    @given(st.data())
    def test_a_changed_byte_is_refused_or_gives_a_message(self, data):
        frame = bytearray(encode(MANIFEST, {"x": torch.arange(50.0)}, "zstd"))
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))

        with suppress(MessageError):
            assert isinstance(decode(bytes(frame)), Message)

    def test_a_bomb_is_refused_by_the_size_it_states_before_that_is_allocated(self):
        bomb = zstandard.compress(bytes(2**26))
        assert len(bomb) < 2**13

        tracemalloc.start()
        try:
            with pytest.raises(MessageError, match=f"{2**26} bytes is larger than the {2**20} allowed"):
                decode(bomb, max_bytes=2**20)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert peak < 2**20

    def test_a_frame_that_does_not_state_its_size_is_refused(self):
        silent = zstandard.ZstdCompressor(write_content_size=False).compress(encode(MANIFEST, {}))

        with pytest.raises(MessageError, match="does not state its decompressed size"):
            decode(silent)

    @pytest.mark.parametrize("claimed", [1_000, 60_000])
    def test_a_frame_that_states_a_wrong_size_is_refused(self, claimed):
        frame = bytearray(zstandard.compress(np.random.default_rng(0).bytes(10_000)))
        # Bytes 5 and 6 hold the size, less 256, of a frame of this size.
        assert zstandard.frame_content_size(bytes(frame)) == int.from_bytes(frame[5:7], "little") + 256
        frame[5:7] = (claimed - 256).to_bytes(2, "little")

        with pytest.raises(MessageError, match="cannot be decompressed"):
            decode(bytes(frame))

    def test_bytes_after_the_frame_are_refused(self):
        with pytest.raises(MessageError, match="cannot be decompressed"):
            decode(encode(MANIFEST, {}, "zstd") + b"more")

    def test_a_compressed_message_at_the_limit_is_read(self):
        tensors = {"x": torch.ones(5)}
        size = len(encode(MANIFEST, tensors))

        assert decode(encode(MANIFEST, tensors, "zstd"), max_bytes=size).manifest == MANIFEST
        with pytest.raises(MessageError, match="larger than"):
            decode(encode(MANIFEST, tensors, "zstd"), max_bytes=size - 1)


class TestMostBytes:
    @given(tensors_of(**wide(65504)), st.sampled_from(["fp32", "fp16", "int8"]))
    def test_no_message_is_larger(self, tensors, dtype):
        manifest = replace(MANIFEST, dtype=dtype, metrics={f"metric_{index}": 1 / 3 for index in range(20)})
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

        assert len(encode(manifest, tensors)) <= most_bytes(shapes)
        assert len(encode(manifest, tensors)) <= most_bytes(shapes, dtype)

    @pytest.mark.parametrize("wire_dtype", ["fp32", "fp16", "int8"])
    def test_no_message_of_a_run_is_larger(self, wire_dtype):
        shapes = {"large": (2**20,)}
        tensors = {"large": torch.rand(shapes["large"])}

        for dtype in TRAVELLING[wire_dtype]:
            sent = encode(replace(MANIFEST, dtype=dtype), tensors, "zstd")
            assert len(sent) <= most_bytes(shapes, wire_dtype)

    def test_the_long_names_of_a_deep_model_fit(self):
        tensors = {f"encoder.{'base_model.model.' * 12}{index}": torch.zeros(0) for index in range(1000)}

        assert len(encode(replace(MANIFEST, dtype="int8"), tensors)) <= most_bytes(dict.fromkeys(tensors, (0,)))


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

    def test_text_beside_the_manifest_is_refused(self):
        metadata = {"manifest": json.dumps(vars(MANIFEST)), "patient": "a name"}

        with pytest.raises(MessageError, match="1 key beside its manifest"):
            decode(save({"x": torch.ones(1)}, metadata=metadata))

    @pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"kind": "update"}'])
    def test_a_malformed_manifest_is_refused(self, text):
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
    def test_an_invalid_scale_is_refused(self, scale):
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

    def test_an_expected_message_passes(self):
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
            ({"samples": 0}, "sample count is below 1"),
            ({"samples": 2**31}, "sample count is above"),
        ],
    )
    def test_a_differing_manifest_is_named(self, manifest, said):
        with pytest.raises(MessageError, match=said):
            check(Message(replace(MANIFEST, **manifest), self.tensors), **self.expected)

    def test_a_known_sample_count_must_match(self):
        check(Message(MANIFEST, self.tensors), **self.expected, samples=MANIFEST.samples)
        with pytest.raises(MessageError, match=f"claims {MANIFEST.samples} training images, and 7000 before.*force"):
            check(Message(MANIFEST, self.tensors), **self.expected, samples=7000)

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

    def test_all_differences_are_named_at_once(self):
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

    def test_a_decoded_tensor_has_the_hash_of_what_was_sent(self):
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


def test_a_message_holds_the_privacy_that_a_site_has_spent() -> None:
    said = PrivacySpent("patient-level", epsilon=2.5, delta=1e-5, noise_multiplier=1.25)
    manifest = replace(MANIFEST, privacy=said)

    assert decode(encode(manifest, {})).manifest.privacy == said
    assert outline(encode(manifest, {}))["manifest"]["privacy"]["level"] == "patient-level"


@pytest.mark.parametrize("change", [{"level": "site-level"}, {"epsilon": "2"}, {"epsilon": math.inf}, {"more": 1}])
def test_a_malformed_privacy_field_is_refused(change: dict) -> None:
    said = {"level": "image-level", "epsilon": 2.5, "delta": 1e-5, "noise_multiplier": 1.0} | change
    values = MANIFEST.as_json() | {"privacy": said}
    blob = save({}, metadata={"manifest": json.dumps(values)})

    with pytest.raises(MessageError, match="privacy"):
        decode(blob)
