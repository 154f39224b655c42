"""What the reference pages need beside the docstrings: doctests as code, and named fields."""

import griffe


class DoctestBlocks(griffe.Extension):
    """Fence doctests, which Markdown would read as quotations, and list NamedTuples' fields."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = fence_doctests(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Append the fields of a NamedTuple with their types."""
        if cls.docstring and any(str(base) == "NamedTuple" for base in cls.bases):
            fields = [f"- `{name}`: `{field.annotation}`" for name, field in cls.attributes.items()]
            cls.docstring.value += "\n\n" + "\n".join(fields)


def fence_doctests(text: str) -> str:
    """Fence the doctests of a docstring.

    >>> fence_doctests("Add.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['Add.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    lines, inside = [], False
    for line in text.splitlines():
        if not inside and line.startswith(">>>"):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    if inside:
        lines.append("```")
    return "\n".join(lines)
