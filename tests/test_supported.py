"""docs/models.md says what the tests check."""

from supported import PAGE, page


def test_the_page_is_made_from_the_cases_of_the_tests():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/supported.py"
