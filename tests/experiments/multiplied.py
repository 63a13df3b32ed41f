"""VPT by another way of learning: its gradient is multiplied by A Aᵀ across the layers, as CDC's A does it. No
prompt of a layer is added to another one's, and yet `from_cdc` trains as CDC does:

    python train.py --task shapes --method cdc,tests/experiments/multiplied.py:from_cdc
"""

from dataclasses import replace

import torch

from ivpt import IVPT, cdc


def from_vpt(vit, num_classes, settings):
    """VPT with P's gradient [L, N, D] multiplied by A Aᵀ, from the start of VPT."""
    prompts = replace(settings.prompts, structure='vpt', aggregation=False, reinforcement='none')
    model = IVPT(vit, num_classes, prompts)
    A = cdc(torch.eye(vit.L).unsqueeze(1)).squeeze(1)  # [L, L]
    model.P.register_hook(lambda gradient: torch.einsum('lm,mnd->lnd', (A @ A.T).to(gradient), gradient))
    return model


def from_cdc(vit, num_classes, settings):
    """The same from the start of CDC, P̂ = A P."""
    model = from_vpt(vit, num_classes, settings)
    with torch.no_grad():
        model.P.copy_(cdc(model.P))
    return model
