"""The reference's way to repair, written anew for comparison: no part of it is used by sinder.

Every target weight is a parametrization U diag(S + ε) Vᵀ that is rebuilt in each forward pass, and so are queries and
keys, with an ε that stays zero; autograd goes through the whole depth; gradients outside the window are thrown away;
SGD with momentum; one image at a time. The authors' code switches xFormers off and so forms the attention matrix.
Detection and loss are sinder's own functions, so that only the way of computing the step differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sinder_cli import Backbone, BlockMap, WeightRef
from sinder_cli.backbone.contract import references, trained_references
from sinder_cli.defects.detection import DetectionRule, alignment_logits, defect_mask
from sinder_cli.defects.tokens import in_precision, patch_grid
from sinder_cli.repairing.forward import Directions
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.repairing.step import neighbour_loss


class Rebuilt(nn.Module):
    """A parameter some rows of which are U diag(S + ε) Vᵀ, with an ε that is trained or stays zero."""

    def __init__(self, weight: Tensor, references: dict[str, WeightRef], trained: set[str]) -> None:
        super().__init__()
        self.spans = {role: ref.rows or (0, len(weight)) for role, ref in references.items()}
        self.epsilon = nn.ParameterDict()
        for role, (start, stop) in self.spans.items():
            U, S, Vt = torch.linalg.svd(weight[start:stop].detach(), full_matrices=False)
            key = role.replace(".", "_")
            for kind, tensor in (("U", U), ("S", S), ("Vt", Vt)):
                self.register_buffer(f"{key}_{kind}", tensor.contiguous())
            self.epsilon[key] = nn.Parameter(torch.zeros_like(S), requires_grad=role in trained)

    def forward(self, weight: Tensor) -> Tensor:
        pieces, at = [], 0
        for role, (start, stop) in sorted(self.spans.items(), key=lambda item: item[1]):
            key = role.replace(".", "_")
            U, S, Vt = (getattr(self, f"{key}_{kind}") for kind in ("U", "S", "Vt"))
            pieces += [weight[at:start], U @ torch.diag(S + self.epsilon[key]) @ Vt]  # as the authors' code has it
            at = stop
        return torch.cat([*pieces, weight[at:]])


def by_parameter(block: BlockMap) -> dict[str, dict[str, WeightRef]]:
    """The linear layers' weights of a block by role, for each parameter that holds some."""
    found: dict[str, dict[str, WeightRef]] = {}
    for role, ref in references(block):
        if role in trained_references(block) or role in ("attention.query", "attention.key"):
            found.setdefault(ref.name, {})[role] = ref
    return found


class ReferenceRepair:
    """The training loop of the reference, one image a step."""

    def __init__(self, backbone: Backbone, module: nn.Module, directions: Directions, settings: RepairSettings) -> None:
        self.backbone, self.module, self.directions, self.settings = backbone, module, directions, settings
        self.by_block: list[list[nn.Parameter]] = []
        for block in backbone.layers.blocks:
            trained = trained_references(block)
            rebuilt = [self._parametrize(name, roles, set(trained)) for name, roles in by_parameter(block).items()]
            epsilons = (epsilon for part in rebuilt for epsilon in part.epsilon.values())
            self.by_block.append([epsilon for epsilon in epsilons if epsilon.requires_grad])
        self.optimizer = torch.optim.SGD(
            [epsilon for block in self.by_block for epsilon in block], lr=settings.lr, momentum=settings.momentum
        )

    def _parametrize(self, name: str, references: dict[str, WeightRef], trained: set[str]) -> Rebuilt:
        parent, attribute = name.rsplit(".", 1)
        owner = self.module.get_submodule(parent)
        rebuilt = Rebuilt(getattr(owner, attribute), references, trained)
        parametrize.register_parametrization(owner, attribute, rebuilt)
        return rebuilt

    def step(self, image: Tensor) -> float | None:
        """One image `[1, 3, H, W]`; the loss, or None for a clean one."""
        self.optimizer.zero_grad()
        settings, rule = self.settings, DetectionRule.of(self.settings)
        running = in_precision(self.backbone, settings.dtype, settings.tf32)
        with torch.enable_grad():
            tokens, context = running.embed(self.module, image)
            for block in range(running.depth):
                tokens = running.run_block(self.module, block, tokens, context)
                if not rule.trusts(self.directions.gaps[block]):
                    continue
                patches = patch_grid(self.backbone, tokens, image)
                logits = alignment_logits(patches.detach(), self.directions.nu[block])
                masks = defect_mask(logits, rule)
                if masks.sum() < rule.min_tokens:
                    continue
                loss = neighbour_loss(patches[0], logits[0], masks[0], settings.kernel, settings.temperature)
                loss.backward()
                for earlier in self.by_block[: block - settings.window + 1]:
                    for epsilon in earlier:
                        epsilon.grad = None
                self.optimizer.step()
                return loss.item()
        return None
