"""Directives: what may be one, and what of it may be seen."""

import json

import pytest

from ibex.domain.directives import MAX_DIRECTIVE_BYTES, Directive, DirectiveMode, check_directive_text


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "é" * (MAX_DIRECTIVE_BYTES // 2 + 1), "\ud800"])
def test_a_text_that_cannot_be_a_directive_is_explained(text: str) -> None:
    assert check_directive_text(text)


def test_the_largest_text_is_allowed() -> None:
    assert check_directive_text("x" * MAX_DIRECTIVE_BYTES) is None


def test_the_prepared_forms_say_the_text() -> None:
    directive = Directive(1, DirectiveMode.USER_PREPEND, 'a "b"\n')

    assert json.loads(directive.system_message) == {"role": "system", "content": directive.text}
    assert json.loads(b'"' + directive.prefix + b'"') == f"[DIRECTIVE]: {directive.text}\n\n"
    assert directive.text not in repr(directive)
