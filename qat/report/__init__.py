"""The report of a run: one self-contained HTML file made from the files of the run folder alone."""

from qat.report.page import write_report

__all__ = ["write_report"]
