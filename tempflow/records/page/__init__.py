"""report.html: a run to look at, one file that needs no network."""

from tempflow.records.page.write import write_page

__all__ = ["write_page"]
