"""docs/hypervisors.md says what the backends say."""

from __future__ import annotations

import dataclasses

from hypervisors.machine import Capabilities
from tests.style import hypervisors_page


def test_table_of_the_page_is_current() -> None:
    text = "run `python -m tests.style.hypervisors_page -w`"
    assert hypervisors_page.page() == hypervisors_page.PAGE.read_text(), text


def test_every_ability_has_its_words() -> None:
    assert list(hypervisors_page.WORDS) == [
        field.name for field in dataclasses.fields(Capabilities)
    ]
