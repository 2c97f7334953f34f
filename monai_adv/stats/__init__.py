"""Paired statistics over subjects: exact Wilcoxon signed-rank, Holm, effect sizes, Friedman, bootstrap, tables."""

from .comparison import Comparison, compare
from .effect import hodges_lehmann, rank_biserial
from .metrics_saver import read_metrics_saver
from .multiplicity import holm, pairs_needed, rejected
from .ranking import CriticalDifference, FriedmanResult, critical_difference, friedman, rank_stability
from .resampling import BootstrapResult, bootstrap_mean_difference
from .signed_rank import WilcoxonResult, wilcoxon
from .summary import summarise
from .tables import write_csv

__all__ = [
    "BootstrapResult",
    "Comparison",
    "CriticalDifference",
    "FriedmanResult",
    "WilcoxonResult",
    "bootstrap_mean_difference",
    "compare",
    "critical_difference",
    "friedman",
    "hodges_lehmann",
    "holm",
    "pairs_needed",
    "rank_biserial",
    "rank_stability",
    "read_metrics_saver",
    "rejected",
    "summarise",
    "wilcoxon",
    "write_csv",
]
