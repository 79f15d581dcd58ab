"""Rewrite the tables of docs/losses.md: `python -m tests.losses_page`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from build_tools.pages import check_markers, replace_section
from tests.helpers.loss_forms import Form
from tests.known_losses import PARTLY, SWAPPED
from tests.other_losses import ELSEWHERE, OTHERS

PAGE = Path(__file__).parent.parent / "docs/losses.md"


def rendered(page: str) -> str:
    """Return the page with its tables as the known losses are."""
    for name, section in sections().items():
        check_markers(page, name, "the table")
        page = replace_section(page, name, section)
    return page


def sections() -> dict[str, str]:
    """Return each section by the name of its markers."""
    swapped = [(_code(form.make), _call(form), form.returns, form.options, _links(form)) for form in SWAPPED]
    partly = [(_code(form.make), _call(form), form.returns, form.options, form.only, _links(form)) for form in PARTLY]
    elsewhere = [(_loss(form), _code(form.instead), form.why, _links(form)) for form in ELSEWHERE]
    others = [f"{_links(form)} {_code(form.make)}: {form.why}" for form in OTHERS]
    return {
        "swapped": _table("constructed as | called | returns | computes | in", swapped),
        "partly": _table("constructed as | called | returns | computes | swapped for calls with | in", partly),
        "elsewhere": _table("loss | the same | not swapped because | in", elsewhere),
        "others": "; ".join(others) + ".",
        "count": _count(),
    }


def _table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    rule = " | ".join("---" for _ in header.split(" | "))
    return "\n".join(f"| {line} |" for line in (header, rule, *(" | ".join(row) for row in rows)))


def _code(text: str) -> str:
    return f"`{re.sub(r'load[(][^)]*[)][.]', '', text)}`"


def _call(form: Form) -> str:
    return _code(form.call)


def _loss(form: Form) -> str:
    return _code(form.make + ("" if form.call == "(f, y)" else form.call))


def _links(form: Form) -> str:
    found = dict.fromkeys(repository for repository, _ in form.places())
    links = ", ".join(f"[{name.partition('/')[2]}](https://github.com/{name})" for name in found)
    return f"{links}, not on torch 2.11 as published" if form.patch[0] else links


def _count() -> str:
    """Return the number of batch-hard losses that are objects, and how many of them are swapped."""
    objects = [
        {(place, form.make) for form in forms if "(" in form.make for place in form.places()}
        for forms in (SWAPPED, PARTLY, ELSEWHERE)
    ]
    repositories = {repository for found in objects for (repository, _), _ in found}
    swapped, partly, elsewhere = map(len, objects)
    return (
        f"Of the {swapped + partly + elsewhere} batch-hard losses that these {len(repositories)} repositories "
        f"construct as objects, {swapped + partly} are swapped, {partly} of them for some calls."
    )


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
