"""`python -m igb_kernels report`: one HTML page of what benchmarks and profiles have saved."""

from igb_kernels.report.files import Found, find
from igb_kernels.report.page import page

__all__ = ["Found", "find", "page"]
