"""Paper and cost of each rule, for tables. The file of the rule has the details.

The cost is the time to compute n weights from the statistics. The cost of the statistics depends on the
rule's `needs`. "QP" is a quadratic program in n unknowns, solved to its optimality conditions. "host" means
float64 on the CPU; an accelerator waits once for it. Times in milliseconds: `benchmarks/results/solvers.md`.
"""

from __future__ import annotations

from typing import NamedTuple

_VECTOR = "O(n)"
_SPECTRUM = "O(n³), host"
_QP = "QP, host"
_NEWTON = "O(n³) per iteration, host"
_PASSES = "O(n³), host"


class Source(NamedTuple):
    """Origin and cost of one rule.

    Attributes:
        paper: authors, venue, year; a description if there is no paper.
        cost: time to compute the weights of n tasks.
    """

    paper: str
    cost: str


SOURCES: dict[str, Source] = {
    "aligned_mtl": Source("Senushkin et al., CVPR 2023", _SPECTRUM),
    "cagrad": Source("Liu et al., NeurIPS 2021", "convex program, host"),
    "coba": Source("Gong et al., EMNLP 2024", "O(n · window)"),
    "conflict_free": Source("Liu, Chu and Thuerey, ICLR 2025", _SPECTRUM),
    "db_mtl": Source("Lin et al., arXiv 2308.12029", _VECTOR),
    "dual_proj": Source("Lopez-Paz and Ranzato, NeurIPS 2017", _QP),
    "dwa": Source("Liu, Johns and Davison, CVPR 2019", _VECTOR),
    "encodec": Source("Défossez et al., 2022", _VECTOR),
    "equal": Source("baseline", _VECTOR),
    "fairgrad": Source("Ban and Ji, ICML 2024", _NEWTON),
    "famo": Source("Liu et al., NeurIPS 2023", _VECTOR),
    "fixed": Source("baseline", _VECTOR),
    "generalized_mean": Source("Su, kexue.fm/archives/8870", _VECTOR),
    "geometric_mean": Source("Chennupati et al., CVPRW 2019", _VECTOR),
    "grad_norm": Source("Chen et al., ICML 2018", _VECTOR),
    "gradvac": Source("Wang et al., ICLR 2021", _PASSES),
    "imtl_l": Source("Liu et al., ICLR 2021", _VECTOR),
    "imtlg": Source("Liu et al., ICLR 2021", _SPECTRUM),
    "initial_loss": Source("Su, kexue.fm/archives/8870", _VECTOR),
    "inverse_grad_norm": Source("Su, kexue.fm/archives/8870", _VECTOR),
    "inverse_loss": Source("Su, kexue.fm/archives/8870", _VECTOR),
    "krum": Source("Blanchard et al., NeurIPS 2017", "O(n² log n), host"),
    "log_sum_exp": Source("textbook smooth maximum", _VECTOR),
    "mgda": Source("Sener and Koltun, NeurIPS 2018", _QP),
    "nash_mtl": Source("Navon et al., ICML 2022", _NEWTON),
    "ntk_balance": Source("Wang, Yu and Perdikaris, J. Comput. Phys. 2022", _VECTOR),
    "pcd": Source("Priority-Constrained Descent, TMLR 2026", _QP),
    "pcgrad": Source("Yu et al., NeurIPS 2020", _PASSES),
    "primary_auxiliary": Source("Su, kexue.fm/archives/8907", _QP),
    "prior_loss": Source("Su, kexue.fm/archives/8870", _VECTOR),
    "relobralo": Source("Bischof and Kraus, 2021", _VECTOR),
    "rlw": Source("Lin et al., TMLR 2022", _VECTOR),
    "soft_adapt": Source("Heydari, Thompson and Mehmood, 2019", _VECTOR),
    "stch": Source("Lin et al., ICML 2024", _VECTOR),
    "token_share": Source("baseline", _VECTOR),
    "uncertainty": Source("Kendall, Gal and Cipolla, CVPR 2018", _VECTOR),
    "upgrad": Source("Quinton and Rey, arXiv 2406.16232", "n QPs, host"),
    "clamp": Source("combinator", "O(n) + inner rule"),
    "every": Source("combinator", "inner rule, every k-th step"),
    "normalize": Source("combinator", "O(n) + inner rule"),
    "of_log_losses": Source("official code of FAMO", "O(n²) + inner rule"),
    "preference": Source("combinator", "O(n) + inner rule"),
    "last_seen": Source("combinator", "O(n²) + inner rule"),
    "keep_norm": Source("combinator", "O(n²) + inner rule"),
    "relative": Source("combinator", "O(n) + inner rule"),
    "smooth": Source("combinator", "O(n) + inner rule"),
    "warmup": Source("combinator", "inner rule, after the warm-up"),
}
