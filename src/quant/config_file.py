"""Configuration files: JSON, or YAML where PyYAML is installed; no key twice in either."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..store import read_json
from ..store.jsonfile import reject_duplicates


def read_config(path: str | Path) -> Mapping[str, Any]:
    """What a .json, .yaml or .yml file holds."""
    path = Path(path)
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} is no configuration; valid endings: .json, .yaml, .yml")
    if importlib.util.find_spec("yaml") is None:
        raise UserError(
            f"{path} is YAML, which needs PyYAML: `pip install pyyaml`, or write it as JSON"
        )
    held = read_yaml(path)
    held = {} if held is None else held
    if not isinstance(held, Mapping):
        raise UserError(f"{path} holds a {type(held).__name__}, not a table")
    return held


def read_yaml(path: Path) -> Any:
    """Plain data; PyYAML itself would take the last of two equal keys and say nothing."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            keys = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            reject_duplicates([(key.value, None) for key in keys])
            return node

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a .json, .yaml or .yml file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML that this program reads ({why})") from None
