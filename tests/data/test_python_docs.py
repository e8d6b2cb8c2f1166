from __future__ import annotations

import pytest

from avatarl.data.python_docs import python_documents


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(python_documents())


def test_it_is_a_corpus_of_about_two_megabytes(documents):
    size = sum(len(text.encode("utf-8")) for text in documents)
    assert 1_500_000 < size < 6_000_000
    assert len(documents) == len(set(documents)) > 4000


def test_a_docstring_stands_under_its_name_and_arguments(documents):
    headings = {text.partition("\n\n")[0] for text in documents}
    assert {"module argparse", "class argparse.ArgumentParser(_AttributeHolder, _ActionsContainer)"} <= headings
    assert "textwrap.dedent(text)" in headings
    assert "math.comb(n, k, /)" in headings
    assert any(heading.startswith("sorted(") for heading in headings)


def test_topics_of_the_language_reference_come_first(documents):
    assert documents[0].startswith('The "assert" statement\n*****')
    assert sum(text.split("\n")[1:2] == ["*" * len(text.split("\n")[0])] for text in documents) > 40


def test_the_order_is_fixed_and_tests_and_addresses_are_left_out(documents):
    assert documents == list(python_documents())
    headings = [text.partition("\n\n")[0] for text in documents]
    assert not [heading for heading in headings if " at 0x" in heading]
    assert not [
        heading for heading in headings if heading.startswith(("module test.", "module idlelib", "module pip."))
    ]
