"""Direct preference optimization: make the chosen answer of a pair more likely than the rejected one.

For each pair, with log-probabilities summed over the trained tokens of an answer, the loss is

    -log sigmoid(beta · ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))))
    - nll_weight · log p(chosen) / (trained tokens of chosen)

The reference is the model before training. Llama 3.1 (paper, section 4.1.4) uses beta 0.1 and nll_weight 0.2,
and does not train the tokens of headers and ends (``mask_ends`` of the data). Rows come from
`data.pairs.PairStream`. Source: Rafailov et al. (arXiv 2305.18290). The second term: Pang et al. (arXiv
2404.19733).

Shapes: B rows, T time, D model dim, N trained tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...data.batch import IGNORE, Batch
from ...llama.model import LlamaLM
from ..section import PositiveReal
from .base import Loss, Objective, ObjectiveSection

CHUNK = 512
"""Trained tokens whose logits are in memory at a time."""


class dpo:
    """The objective for pairs, with a frozen ``reference``."""

    def __init__(self, reference: LlamaLM, *, beta: float = 0.1, nll_weight: float = 0.2) -> None:
        self.reference, self.beta, self.nll_weight = reference, beta, nll_weight

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> Loss:
        ours_P2, counts_P2 = answer_log_probs(hidden_BTD, head, batch)
        with torch.no_grad():
            reference_BTD = self.reference(batch.tokens_BT, batch.positions_BT, batch.attend)
            theirs_P2, _ = answer_log_probs(reference_BTD, self.reference.lm_head, batch)
        ratios_P2 = ours_P2 - theirs_P2
        margins_P = self.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
        preference = -F.logsigmoid(margins_P).sum()
        nll = -(ours_P2[:, 0] / counts_P2[:, 0]).sum()
        metrics = {
            "preference_loss": preference,
            "nll": nll,
            "margin": margins_P.sum(),
            "accuracy": (margins_P > 0).float().sum(),
        }
        pairs = torch.tensor(len(margins_P), device=hidden_BTD.device)
        total = preference + self.nll_weight * nll if self.nll_weight else preference
        return Loss(total, pairs, {name: value.detach() for name, value in metrics.items()})

    def extra_flops_per_token(self, context: int) -> float:
        """Return the FLOPs per token of the reference's forward on rows of ``context``."""
        return self.reference.config.flops_per_token(context / 2)

    def signature(self) -> dict[str, object]:
        """Return the settings that must not change when a run is resumed."""
        return {"objective": "dpo", "beta": self.beta, "nll_weight": self.nll_weight}


def answer_log_probs(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed log-probabilities and the numbers of tokens of each pair's answers, (P, 2) each.

    Column 0 is the chosen answer, column 1 the rejected one.
    """
    assert batch.documents_BT is not None, "pairs come packed"
    trained_BT = batch.targets_BT != IGNORE
    hidden_ND, targets_N = hidden_BTD[trained_BT], batch.targets_BT[trained_BT]
    width = int(batch.documents_BT.max()) + 1
    row_BT = torch.arange(len(batch), device=trained_BT.device)[:, None].expand_as(trained_BT)
    document_N = (row_BT * width + batch.documents_BT)[trained_BT]
    chunks = zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
    parts = [checkpoint(_log_probs, h_CD, t_C, head, use_reentrant=False) for h_CD, t_C in chunks]
    logp_N = torch.cat(cast("list[Tensor]", parts))
    sums = logp_N.new_zeros(len(batch) * width).index_add(0, document_N, logp_N)
    counts = torch.bincount(document_N, minlength=len(batch) * width)
    used = counts.nonzero().flatten()  # padding has no trained token, and every answer has one
    return sums[used].view(-1, 2), counts[used].view(-1, 2)


def _log_probs(hidden_CD: Tensor, targets_C: Tensor, head: nn.Module) -> Tensor:
    logits_CV = head(hidden_CD)
    logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    return -F.cross_entropy(logits_CV, targets_C, reduction="none")


class DpoSection(ObjectiveSection):
    """Preference tuning against the frozen ``reference``, usually the model that the run starts from."""

    kind: Literal["dpo"]
    reference: str
    beta: PositiveReal = 0.1
    nll_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    rows = frozenset({"pairs"})

    def parents(self) -> dict[str, str]:
        return {"reference": self.reference}

    def build(self, load_frozen: Callable[[str], LlamaLM]) -> Objective:
        return dpo(load_frozen(self.reference), beta=self.beta, nll_weight=self.nll_weight)
