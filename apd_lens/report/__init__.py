"""One page to look at: a decomposition as a self-contained HTML file, which opens from disk without network.

Needs jinja2, pandas and plotly: pip install 'apd-lens[report]'.
"""

from apd_lens._errors import MissingExtra

try:
    import jinja2  # noqa: F401
    import pandas  # noqa: F401
    import plotly  # noqa: F401
except ImportError as error:
    raise MissingExtra(
        "apd_lens.report needs jinja2, pandas and plotly. Install them with pip install 'apd-lens[report]'"
    ) from error

from apd_lens.report._page import write_report as write_report
