"""Schemas of the wire types, made by msgspec: exact about tags, bounds and unions, with every field's
docstring."""

import ast
import inspect
from functools import cache
from types import ModuleType
from typing import Any

import msgspec

from tinkerbell import types, wire

_REF = "#/components/schemas/{name}"


@cache
def wire_schemas() -> dict[str, dict[str, Any]]:
    """Name -> JSON Schema of every type of `/v1`, and of what those consist of."""
    classes = [cls for module in (types, wire) for cls in vars(module).values() if _is_struct(cls)]
    by_name = {cls.__name__: cls for cls in classes}
    own = [cls for cls in by_name.values() if cls.__module__ == wire.__name__ and cls is not wire.Body]
    _, components = msgspec.json.schema_components([*own, types.ModelInfo], ref_template=_REF)
    documented = {**_field_docs(types), **_field_docs(wire)}
    for name, schema in components.items():
        for base in reversed(by_name[name].__mro__):
            for field, text in documented.get(base.__name__, {}).items():
                schema["properties"][field]["description"] = text
    return components


def _is_struct(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, msgspec.Struct)


def _field_docs(module: ModuleType) -> dict[str, dict[str, str]]:
    """Class -> field -> the string literal below the field."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = docs.setdefault(node.name, {})
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                fields[field.target.id] = inspect.cleandoc(below.value.value)
    return docs
