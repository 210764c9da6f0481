"""Reads apd_lens for the API reference without importing it (a griffe extension; see mkdocs.yml)."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?m)^>>> .*(?:\n(?!\s*$).*)*")


class ApdLens(griffe.Extension):
    """`name = checked(function)` is documented as the function, what a room hands out (`x as x`) as its own, and `>>>`
    lines are shown as code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for module in _modules(pkg):
            for name, member in list(module.members.items()):
                if not member.is_alias and member.is_attribute and (function := _checked(member)) is not None:
                    module.set_member(name, griffe.Alias(name, function, lineno=member.lineno, parent=module))
            if module.is_init_module:
                handed_out = re.findall(r"(?m)import (\w+) as \1$", "\n".join(module.lines))
                own = [name for name, member in module.members.items() if not (member.is_imported or member.is_module)]
                module.exports = [*handed_out, *(name for name in own if not name.startswith("_"))]

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(r"```python\n\g<0>\n```", obj.docstring.value)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    inner = [member for member in module.members.values() if not member.is_alias and member.is_module]
    return [module, *(found for member in inner for found in _modules(member))]


def _checked(attribute: griffe.Attribute) -> str | None:
    """The path of the function that `checked(...)` was given, or None for any other value."""
    value = attribute.value
    if isinstance(value, griffe.ExprCall) and str(value.function).lstrip("_") == "checked":
        argument = value.arguments[0]
        assert isinstance(argument, griffe.Expr)
        return argument.canonical_path
    return None
