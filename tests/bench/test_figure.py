"""Figures, their table and their picture, without measuring anything."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from tests.bench.bare_guest import read_cpio
from tests.bench.figure import Aim, Figure, quantile, rounds
from tests.bench.picture import draw
from tests.bench.report import as_json, number, table


def figure(aim: Aim | None, samples: tuple[float, ...] = (1.0, 2.0, 9.0)) -> Figure:
    return Figure(
        name="a <figure>", unit="ms", samples=samples, peer="other", peer_samples=(4.0,), aim=aim
    )


@pytest.mark.parametrize(
    ("aim", "judged", "is_reached"),
    [
        (None, None, None),
        (Aim(of="median", limit=2), 2.0, True),
        (Aim(of="median", limit=1.9), 2.0, False),
        (Aim(of="p99", limit=8), 9.0, False),
        (Aim(of="max", limit=9), 9.0, True),
        (Aim(of="ratio", limit=0.5), 0.5, True),
        (Aim(of="median", limit=2, at_least=True), 2.0, True),
        (Aim(of="median", limit=3, at_least=True), 2.0, False),
    ],
)
def test_an_aim_is_judged_by_what_it_is_about(
    aim: Aim | None, judged: float | None, is_reached: bool | None
) -> None:
    assert figure(aim).judged == judged
    assert figure(aim).is_reached is is_reached


def test_few_samples_have_the_last_as_their_p99() -> None:
    assert quantile([3, 1, 2], 0.99) == 3
    assert quantile(range(1000), 0.99) == 990


def test_rounds_are_fewer_when_the_time_is_over() -> None:
    assert list(rounds(10, 0.0)) == [0, 1, 2]
    assert list(rounds(4, 60.0)) == [0, 1, 2, 3]


def test_the_table_says_in_words_whether_an_aim_is_reached() -> None:
    head, _, reached, missed = table(
        [figure(Aim(of="median", limit=2)), figure(Aim(of="ratio", limit=0.4))]
    )
    assert head.startswith("figure")
    assert reached.endswith("≤ 2          yes")
    assert missed.endswith("ratio ≤ 0.4  NO")
    assert "4.00 other" in reached


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (None, 0.123, 12.34, 1234.5)] == ["", "0.12", "12.3", "1234"]


def test_the_picture_is_xml_and_shows_only_what_has_an_aim() -> None:
    picture = ElementTree.fromstring(
        draw([figure(None), figure(Aim(of="median", limit=600, at_least=True))])
    )
    texts = [element.text for element in picture.iter() if element.text and element.text.strip()]
    assert texts.count("a <figure>") == 1
    assert "2.00 ms, aim ≥ 600" in texts


def test_the_json_has_samples_and_verdicts() -> None:
    record = json.loads(as_json([figure(Aim(of="max", limit=9))], ["start: broken"], []))
    assert record["failures"] == ["start: broken"]
    assert record["figures"][0]["samples"] == [1.0, 2.0, 9.0]
    assert record["figures"][0]["reached"] is True


def test_files_are_found_in_an_archive_of_our_own_builder() -> None:
    from guest.image.cpio import Tree, archive

    tree = Tree()
    tree.file("/etc/modules", b"one\n")
    tree.file("/init", b"program", 0o755)
    assert read_cpio(archive(tree)) == {"etc/modules": b"one\n", "init": b"program"}
