"""Names in C."""

from __future__ import annotations

import re

from quantcli.errors import UsageError

# Words that C, or the source itself, has another use for.
TAKEN = frozenset(
    [
        "auto",
        "break",
        "case",
        "char",
        "const",
        "continue",
        "default",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "typedef",
        "union",
        "unsigned",
        "void",
        "volatile",
        "while",
        "main",
        "kernels",
        "edges",
        "test_vectors",
        "example_main",
        "program",
    ]
)


def check_name(name: str) -> None:
    """Check that a model may have a name in C.

    Raises:
        UsageError: If not.
    """
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,30}", name) or name in TAKEN:
        raise UsageError(
            f"'{name}' is no name for a model in C", "letters, digits and _ (at most 31), and no word of C"
        )
