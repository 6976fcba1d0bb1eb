"""YAML that people write: a key that stands twice is refused, of which PyYAML would take the last."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class RepeatedKeyError(yaml.YAMLError):
    """A mapping has a ``key`` twice, the second time in ``line``, from 1 on."""

    def __init__(self, key: object, line: int) -> None:
        self.key, self.line = key, line
        super().__init__(f"the key {key!r} is there twice, the second time in line {line}; keep one")


def load_yaml(text: str, *, typed: bool = True) -> Any:
    """Return the value of a YAML document; None for an empty one. Not ``typed``: scalars stay text.

    Raises:
        RepeatedKeyError: a mapping has a key twice.
        yaml.YAMLError: the text is no YAML.
        RecursionError: it is nested too deep.
    """
    return yaml.load(text, Loader=_SafeLoader if typed else _TextLoader)  # noqa: S506 - neither makes other objects


class _SafeLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        _check_keys(self, node)
        return super().construct_mapping(node, deep)


class _TextLoader(yaml.BaseLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        _check_keys(self, node)
        return super().construct_mapping(node, deep)


def _check_keys(loader: yaml.BaseLoader | yaml.SafeLoader, node: yaml.MappingNode) -> None:
    seen = set()
    for key_node, _ in node.value:
        # Merged keys (<<) may be overridden, and keys that are no scalars fail later.
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise RepeatedKeyError(key, key_node.start_mark.line + 1)
        seen.add(key)
