"""Parts of documentation that programs write, between <!-- name --> and <!-- /name -->."""

import re


def generated(page: str, name: str) -> str:
    """What stands there."""
    return _match(page, name)[0]


def replaced(page: str, name: str, text: str) -> str:
    """The page with something else there."""
    match = _match(page, name)
    return f"{page[: match.start()]}\n\n{text}\n\n{page[match.end() :]}"


def _match(page: str, name: str) -> re.Match[str]:
    match = re.search(rf"(?<=<!-- {name} -->).*(?=<!-- /{name} -->)", page, re.S)
    assert match, f"the page has no place for {name}"
    return match
