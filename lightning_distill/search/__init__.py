"""Search for settings: trials chosen by Optuna, kept in a file, judged by the validation metric."""

import importlib.util

if importlib.util.find_spec("optuna") is None:
    raise ImportError(
        "`lightning_distill.search` needs Optuna, which is not installed. Install it with "
        "`pip install 'lightning-distill[search]'`."
    )

from lightning_distill.search.limits import Limits
from lightning_distill.search.main import search
from lightning_distill.search.result import Search, Trial
from lightning_distill.search.space import Parameter, read_space
from lightning_distill.search.trial import ReportToOptuna

__all__ = ["Limits", "Parameter", "ReportToOptuna", "Search", "Trial", "read_space", "search"]
