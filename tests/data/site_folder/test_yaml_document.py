"""A YAML document says each thing once."""

from __future__ import annotations

import pytest
import yaml

from fedsca_pipeline.data.site_folder.yaml_document import RepeatedKeyError, load_yaml


def test_values_are_typed_or_stay_text() -> None:
    assert load_yaml("a: 0012\nb: [1.5, yes]\n") == {"a": 10, "b": [1.5, True]}
    assert load_yaml("a: 0012\nb: [1.5, yes]\n", typed=False) == {"a": "0012", "b": ["1.5", "yes"]}
    assert load_yaml("# nothing\n") is None


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 1\n", "a", 3),
        ("{a: 1, a: 2}", "a", 1),
        ("- a:\n    b: 1\n    b: 2\n", "b", 3),
        ("a: &x {c: 1}\nb: {d: 1,\n d: 2}\n", "d", 3),
    ],
)
def test_a_key_twice_is_named_with_its_line(text: str, key: str, line: int, typed: bool) -> None:
    with pytest.raises(RepeatedKeyError, match=f"the key '{key}' is there twice, the second time in line {line}; keep"):
        load_yaml(text, typed=typed)


def test_numbers_that_are_written_in_two_ways_are_one_key() -> None:
    with pytest.raises(RepeatedKeyError, match="key 16"):
        load_yaml("{16: 1, 0x10: 2}")


def test_a_merged_key_may_be_overridden() -> None:
    assert load_yaml("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3\n")["d"] == {"b": 3, "c": 2}


def test_text_that_is_no_yaml_and_keys_that_are_no_scalars_are_refused() -> None:
    for text in ("a: [", "? [1, 2]\n: 3\n"):
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)
