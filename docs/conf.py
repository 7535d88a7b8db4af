"""The documentation as a site: ``python -m nox -s docs``.

Its source is the whole checkout and not this directory, so that a link to the README leads there
on the site, too, and each page is the same file with the same links in both places.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fictive_sqlalchemy import __version__  # noqa: E402

project = "fictive-sqlalchemy"
author = "the fictive-sqlalchemy authors"
copyright = author
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGES.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**"]
exclude_patterns = [".*", "build"]

# Anchors as GitHub makes them of headings, for links such as page.md#limitations.
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"fictive-sqlalchemy {release}"
html_extra_path = ["site"]  # the way from / to the first page
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "76%"}}  # for 100 columns
html_copy_source = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

nitpicky = True
# Other projects' inventories would have to be fetched for these, and a build needs no network.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(sqlalchemy|flask|flask_sqlalchemy|celery|opentelemetry|tenacity|pytest|werkzeug)\..*",
    ),
    (
        r"py:.*",
        r"(collections\.abc|typing|typing_extensions|types|contextlib|enum|os|decimal|uuid|datetime)\..*",
    ),
    (r"py:exc", r"[A-Z][A-Za-z]*"),
    # What signatures name: builtins, and what modules import for type checkers alone.
    (r"py:class", r"bool|dict|float|int|list|object|set|str|tuple|type|[A-Z][A-Za-z]*Error"),
    (r"py:class", r"CoreExecuteOptionsParameter|Dialect|Engine|Flask|Pool|URL|sessionmaker|_\w+"),
    (r"py:class", r"BeginOptions|SessionTransaction"),
    (r"py:class", r"(.*\.)?(OpenTransactions|TransactionOptions|SettingsFunction)"),
    (r"py:class", r"(.*\.)?[A-Z]"),  # type variables
]
# A … stands for anything in what is sent or printed; no lexer knows it.
suppress_warnings = ["misc.highlighting_failure"]

# The order of the pages, which stands in the table of contents of each.
CONTENTS = {
    "Start": [
        "Quick start <../README>",
        "why",
        "tutorial",
        "behaviour",
        "reading",
        "writing",
        "filter-by-or-create",
    ],
    "Sessions you have": [
        "request-scoped-session",
        "atomic-requests",
        "active-record",
        "service-layer",
        "command-line",
        "celery",
        "begin-on-write",
        "migrating",
        "coming-from-django",
    ],
    "Tests": ["testing"],
    "Production": [
        "seeing",
        "atomic",
        "after-commit",
        "retry",
        "lost-servers",
        "read-only-outside",
        "tenants",
        "replicas",
        "more-than-one-server",
        "pgbouncer",
        "workers",
        "streaming",
    ],
    "Look it up": [
        "troubleshooting",
        "debugging",
        "limitations",
        "typing",
        "neighbours",
        "how-it-works",
        "benchmarks",
        "reference/index",
        "../CHANGES",
        "../CONTRIBUTING",
        "../SECURITY",
    ],
}


def add_contents() -> str:
    """Return the tables of contents, for the end of the first page: on GitHub it has none."""
    tables = ""
    for caption, pages in CONTENTS.items():
        tables += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
        tables += "\n".join(pages) + "\n```\n"
    return tables


def read_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Turn what GitHub understands into what Sphinx does."""
    content[0] = re.sub(
        r'^```(\w+) title="([^"]+)"$',
        r"```{code-block} \1\n:caption: `\2`\n",
        content[0],
        flags=re.MULTILINE,
    )
    if docname == root_doc:
        content[0] += add_contents()


def let_code_break(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object
) -> None:
    """Let long code in tables be broken after punctuation, and so not inside a word."""

    def in_word(word: re.Match[str]) -> str:
        # An entity such as &quot; ends with a semicolon, and is whole.
        return re.sub(r"(?<=[._,=/\[{])(?!$)|(?<=\()(?!\)|$)", "<wbr>", word[0])

    def in_code(code: re.Match[str]) -> str:
        return code[1] + re.sub(r"[^<>\s]{12,}", in_word, code[2]) + code[3]

    def in_table(table: re.Match[str]) -> str:
        return re.sub(r'(<span class="pre">)([^<]*)(</span>)', in_code, table[0])

    if "body" in context:
        context["body"] = re.sub(
            r'<table class="docutils.*?</table>', in_table, context["body"], flags=re.DOTALL
        )


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_source)
    app.connect("html-page-context", let_code_break)
