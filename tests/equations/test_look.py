"""Appendix A, Figure 7: what happens inside, layer by layer: where the class token looks, and what AR reinforces."""

import pytest
import torch
from hypothesis import given, settings

import oracle
from ivpt import look
from oracle import close
from strategies import METHODS, OTHERS, cases, random_model, random_vit


@pytest.mark.parametrize('method', METHODS | OTHERS)
@settings(max_examples=settings().max_examples // 4)
@given(case=cases(L=(2, 4)))
def test_what_is_seen_is_what_the_literal_form_computes(method, case):
    """Eq. 14. w̃^l in R^M of each layer: its own weights, prompts in its softmax, mean over the heads; with top-k, the
    tokens that were chosen; the prompts that entered (Eq. 5)."""
    how = (METHODS | OTHERS)[method]
    model, images = random_model(case, **how), case.images()
    seen, expected = look(model, images), oracle.ivpt(model, images)
    close(seen['logits'], expected.logits.detach())
    close(seen['w'], torch.stack(expected.w, dim=1).detach())
    close(seen['to_prompts'], torch.stack(expected.to_prompts, dim=1).detach())
    close(seen['P_hat'], expected.P_hat.detach())
    close(seen['P_hat'], torch.stack([P for _, P in oracle.watch(model, images)[0]]).detach())
    assert (seen['Omega'] is not None) == (how['reinforcement'] == 'topk')
    if seen['Omega'] is not None:
        assert seen['Omega'].tolist() == [list(image) for image in zip(*expected.Omega)]


@given(cases(L=(1, 3)))
def test_a_vit_without_prompts_can_be_looked_at_too(case):
    """Eq. 1. Each layer's row of the attention matrix, at the image tokens."""
    model = random_vit(case, num_classes=2)
    seen, tokens, w = look(model, case.images()), oracle.embed(model, case.images()), []
    for block in model.blocks:
        tokens, A = oracle.layer(block, tokens)
        w.append(A[:, :, 0, 1:].mean(dim=1))
    close(seen['w'], torch.stack(w, dim=1).detach())
    close(seen['logits'], oracle.vit(model, case.images()).detach())
    assert seen['Omega'] is seen['P_hat'] is None


@settings(max_examples=settings().max_examples // 2)
@given(cases())
def test_looking_leaves_nothing_behind(case):
    """No hook stays, even if the model fails."""
    model = random_model(case, **METHODS['ivpt'])
    before = model(case.images())
    look(model, case.images())
    with pytest.raises(ValueError):
        look(model, case.images()[:, :, 1:])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.vit.blocks)
    assert torch.equal(model(case.images()), before)
