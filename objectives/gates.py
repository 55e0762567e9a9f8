"""Trainable gates: which candidate every reconfigurable layer of every branch runs.

Source: Cai et al., ProxylessNAS (ICLR 2019), sections 3.2 and 3.3: binary gates, two-path updates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import gate_gradient
from models.supernet import Draw


class Gates(nn.Module):
    """Gate parameters phi [L, K] of all gated layers at once, p = softmax(phi) over what a layer offers.

    Rows are layers, branch after branch; a layer with fewer than K candidates has the rest masked out.
    phi is a few dozen numbers that the host must know before it can run a path, so it lives there, in
    float64, wherever the networks are: drawing waits for no device, and a whole gate update costs a GPU two
    small copies, the gates to it and their gradients back. Hence phi is no nn.Parameter, which would travel
    with the module; it is part of its state all the same. Draws come from a generator that the caller
    seeds, so that all processes draw alike.

    Args:
        counts: number of candidates of every gated layer.
        full: run all candidates in a gate step; otherwise two of them (the paper's default).
    """

    def __init__(self, counts: Sequence[int], full: bool = False):
        super().__init__()
        self.counts = list(counts)
        self.full = full
        self.offered = torch.arange(max(counts)) < torch.tensor(self.counts)[:, None]
        phi = torch.where(self.offered, torch.randn(self.offered.shape) * 1e-3, 0.0)
        self.phi = phi.double().requires_grad_()
        self._step: _GateStep | None = None  # what the gate step under way has drawn

    def probabilities(self) -> Tensor:
        """p [L, K], 0 for what a layer does not offer.

        Raises:
            FloatingPointError: gate parameters that are no longer finite.
        """
        if not all(map(math.isfinite, self.phi.detach().flatten().tolist())):
            raise FloatingPointError("the gates' parameters are no longer finite")
        return self.phi.detach().masked_fill(~self.offered, -math.inf).softmax(-1)

    def normalised_entropy(self) -> list[float]:
        """Entropy of every layer's p over that of the uniform choice, in [0, 1]; 1 for a layer with one choice."""
        entropy = torch.special.entr(self.probabilities()).sum(-1)
        return [float(h) / math.log(n) if n > 1 else 1.0 for h, n in zip(entropy, self.counts, strict=True)]

    def draw(self, generator: torch.Generator) -> list[Draw]:
        """One candidate a layer, drawn by p."""
        return [Draw(active) for active in self._draw_one(self.probabilities(), generator)]

    def draw_gate_step(self, generator: torch.Generator, like: Tensor | None = None) -> list[Draw]:
        """What a gate step runs: one active candidate a layer, and those whose outputs are wanted beside it.

        In the two-path form two different candidates are drawn by p and one of them is made active by
        their renormalised probabilities. `set_gradient` and `finish_update` complete the step. The binary
        gates are put where `like` is, in its type or float32 if that is wider.
        """
        p = self.probabilities()
        columns = torch.arange(p.shape[1]).expand(len(p), -1) if self.full else self._draw_two(p, generator)
        mass = p.gather(1, columns)
        share = mass / mass.sum(1, keepdim=True)
        active = columns.gather(1, torch.tensor(self._draw_one(share, generator))[:, None])[:, 0].tolist()
        like = torch.empty(0) if like is None else like
        gates = (columns == torch.tensor(active)[:, None]).to(torch.promote_types(like.dtype, torch.float32))
        gates = gates.to(like.device, non_blocking=True).requires_grad_()
        self._step = _GateStep(columns, share, self._log_sum(columns), gates)
        return [
            Draw(chosen, tuple(row[:count].tolist()), line)
            for chosen, row, line, count in zip(active, columns, gates.unbind(), self._widths(columns), strict=True)
        ]

    def leaf(self) -> Tensor:
        """The binary gates [L, J] of the gate step under way, whose gradient backward fills in."""
        return self._step.gates

    def set_gradient(self, average) -> None:
        """phi.grad from the binary gates' gradients, for all layers at once, averaged over processes."""
        step = self._step
        dg = average(step.gates.grad).to(self.phi)  # the step's one wait for the device
        self.phi.grad = torch.zeros_like(self.phi).scatter(1, step.columns, gate_gradient(step.share, dg))

    @torch.no_grad()
    def finish_update(self) -> None:
        """Keep the other candidates' probability mass where only two were updated, and forget the step.

        p of the others is exp(phi) over the sum of all exp(phi): it stays if the pair's sum does.
        """
        step, self._step = self._step, None
        if not self.full:
            shift = step.log_sum - self._log_sum(step.columns)
            self.phi.scatter_add_(1, step.columns, shift.expand(step.columns.shape))

    def _log_sum(self, columns: Tensor) -> Tensor:
        """log sum exp(phi) [L, 1] over the drawn candidates."""
        phi = self.phi.detach().masked_fill(~self.offered, -math.inf)
        return phi.gather(1, columns).logsumexp(1, keepdim=True)

    def _widths(self, columns: Tensor) -> list[int]:
        return [min(count, columns.shape[1]) for count in self.counts]

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "phi"] = self.phi if keep_vars else self.phi.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        saved = state_dict.get(prefix + "phi")
        if saved is None:
            missing.append(prefix + "phi")
        elif saved.shape != self.phi.shape:
            errors.append(f"{prefix}phi: {list(saved.shape)} does not fit {list(self.phi.shape)}")
        else:
            self.phi.copy_(saved)

    @staticmethod
    def _draw_one(p: Tensor, generator: torch.Generator) -> list[int]:
        return torch.multinomial(p, 1, generator=generator)[:, 0].tolist()

    @staticmethod
    def _draw_two(p: Tensor, generator: torch.Generator) -> Tensor:
        # Gumbel's trick: the two largest keys are two draws by p without replacement. A layer with a single
        # candidate gets a second column of probability 0, which `_widths` leaves out.
        noise = -torch.log(torch.empty_like(p).exponential_(generator=generator))
        return (p.log() + noise).topk(min(2, p.shape[1]), dim=1).indices


@dataclass
class _GateStep:
    columns: Tensor  # [L, J] the candidates that run
    share: Tensor  # [L, J] their probabilities, renormalised
    log_sum: Tensor  # [L, 1] their log sum exp(phi) before the update
    gates: Tensor  # [L, J] one-hot, the leaf of the backward pass, on the networks' device
