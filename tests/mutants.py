"""Mistakes that one could make, and whether a test notices each. A command, not a test:

    python tests/mutants.py               all mutants; prints each and how it ended, then the survivors
    python tests/mutants.py --only DA     those whose name has "DA" in it
    python tests/mutants.py --jobs 4      four at a time

Each mutant is a copy of the project in which one piece of text is replaced by another. The test file that
should notice is run first, the whole suite only if it does not.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
VPT, CDC, ALPHA, AR = ('test_3_1_vit_and_vpt', 'test_3_3_cdc_and_da', 'test_3_4_reweighting',
                       'test_3_5_attentive_reinforcement')
STRUCT, LOOK = 'test_4_3_structures', 'test_A_attention_maps'
LOOP, DATA, COUNTS, FILES, INPUT, STOPS, FUZZ = (
    'test_4_1_training', 'test_4_1_data', 'test_4_accounting', 'test_weights', 'test_bad_input', 'test_4_1_interruptions',
    'test_bad_input_fuzz')
FORMATS, SWEEPS, DIALECTS = 'test_4_data_formats', 'test_4_sweeps', 'test_weights_dialects'

IDENTITY, PROCESSES = 'test_4_1_identity', 'test_4_1_processes'
OPTIMISER, EXERCISE = 'test_3_4_optimiser', 'test_exercise'

# (the mistake, the file, the text that is right, the text that is wrong, the test file that should notice)
MUTANTS = [
    # 3.1, the layer
    ('the keys and values of prompts skip LayerNorm', 'vit.py', '*(self.norm1(c) for c in context)', '*context', VPT),
    ('keys and values of prompts are swapped', 'vit.py', 'zip(*pairs)', 'list(zip(*pairs))[::-1]', VPT),
    ('prompts have no bias in their keys and values', 'vit.py', 'F.linear(c, W_KV, b_KV)', 'F.linear(c, W_KV, 0 * b_KV)', VPT),
    ('sqrt(D) for sqrt(D / N_h) in attention', 'vit.py', 'attention(q, k, v)', 'attention(q, k, v, scale=(q.shape[1] * q.shape[3]) ** -0.5)', VPT),
    ('sqrt(D) for sqrt(D / N_h) in the row of weights', 'vit.py', '/ q.shape[-1] ** 0.5).softmax', '/ self.proj.in_features ** 0.5).softmax', VPT),
    ('the row of weights is that of one head', 'vit.py', 'w.mean(dim=1).squeeze(1)', 'w[:, 0].squeeze(1)', VPT),
    ('the row of weights is the maximum over heads', 'vit.py', 'w.mean(dim=1).squeeze(1)', 'w.amax(dim=1).squeeze(1)', VPT),
    ('the row of weights is from before the softmax', 'vit.py', '** 0.5).softmax(-1)', '** 0.5)', VPT),
    ('the row of weights is that of the last token', 'vit.py', 'q[:, :, :1]', 'q[:, :, -1:]', VPT),
    ('the row of weights carries a gradient', 'vit.py', 'with torch.no_grad(), torch.autocast', 'with torch.enable_grad(), torch.autocast', VPT),
    # the last layer's one query
    ('the one query is not divided by sqrt(d)', 'vit.py', "W_K, q) / q.shape[-1] ** 0.5", "W_K, q)", VPT),
    ('the one query has no bias', 'vit.py', 'x[0][:, 0]) + b_Q', 'x[0][:, 0]) + 0 * b_Q', VPT),
    ('the values that the one query gathers have no bias', 'vit.py', 'W_V, wx) + b_V', 'W_V, wx) + 0 * b_V', VPT),
    ('the one query reads keys for values', 'vit.py', "einsum('hde,bhe->bhd', W_V, wx)", "einsum('hde,bhe->bhd', W_K, wx)", VPT),
    ('each context has a softmax of its own', 'vit.py', 'torch.cat([W_Kq @ y.mT for y in x], dim=-1).softmax(-1)',
     'torch.cat([(W_Kq @ y.mT).softmax(-1) for y in x], dim=-1)', VPT),
    ('the one query does not see its own token', 'vit.py', 'for y in (token, *context)]', 'for y in (0 * token, *context)]', VPT),
    ("the last layer's weights are those of one head", 'vit.py', 'w.detach().mean(dim=1)', 'w.detach()[:, 0]', VPT),
    ("the last layer's weights carry a gradient", 'vit.py', 'w.detach().mean(dim=1)', 'w.mean(dim=1)', VPT),
    ('the MLP has no residual connection', 'vit.py', 'return tokens + self.mlp(', 'return self.mlp(', VPT),
    ('the MLP sees what LayerNorm has not seen', 'vit.py', 'self.mlp(self.norm2(tokens))', 'self.mlp(tokens)', VPT),
    ('GELU by its tanh formula', 'vit.py', 'F.gelu(self.fc1(x))', "F.gelu(self.fc1(x), approximate='tanh')", VPT),
    ('queries, keys and values in another order', 'vit.py', 'x.unbind(-3)', 'x.flip(-3).unbind(-3)', VPT),
    ('the class token stands last', 'vit.py', 'torch.cat([self.cls_token.expand(len(Z), -1, -1), Z], dim=1)',
     'torch.cat([Z, self.cls_token.expand(len(Z), -1, -1)], dim=1)', VPT),
    ('position embeddings are resampled without antialiasing', 'vit.py', ', antialias=True', '', 'test_3_1_timm'),
    # 3.3, CDC and DA
    ('CDC adds nothing', 'ivpt.py', 'P[1:] + P[:-1]])', 'P[1:]])', CDC),
    ('CDC adds P^l and not P^{l-1}', 'ivpt.py', 'P[1:] + P[:-1]])', 'P[1:] + P[1:]])', CDC),
    ('CDC adds P̂^{l-1} and not P^{l-1} (vanilla CDC)', 'ivpt.py', 'torch.cat([P[:1], P[1:] + P[:-1]])', 'P.cumsum(0)', CDC),
    ('CDC adds P^0 to every layer', 'ivpt.py', 'P[1:] + P[:-1]])', 'P[1:] + P[:1]])', CDC),
    ('CDC connects the first layer with the last', 'ivpt.py', 'torch.cat([P[:1], P[1:] + P[:-1]])', 'P + P.roll(1, 0)', CDC),
    ('DA without γ', 'ivpt.py', 'psi(gamma, P[:-1])', 'P[:-1]', CDC),
    ('DA with γ transposed', 'ivpt.py', 'return gamma @ P', 'return gamma.mT @ P', CDC),
    ('DA with a softmax over γ', 'ivpt.py', 'return gamma @ P', 'return gamma.softmax(-1) @ P', CDC),
    ('DA with the diagonal of γ alone', 'ivpt.py', 'return gamma @ P',
     'return gamma.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * P', CDC),
    ('DA mixes P^l and not P^{l-1}', 'ivpt.py', 'psi(gamma, P[:-1])', 'psi(gamma, P[1:])', CDC),
    ('DA mixes P̂^{l-1} and not P^{l-1}', 'ivpt.py', 'torch.cat([P[:1], P[1:] + psi(gamma, P[:-1])])',
     '[h := P[0], torch.stack([h] + [h := p + g @ h for p, g in zip(P[1:], gamma)])][1]', CDC),
    ('DA replaces P^l', 'ivpt.py', 'P[1:] + psi(gamma, P[:-1])', 'psi(gamma, P[:-1])', CDC),
    ('γ starts at 0', 'ivpt.py', 'torch.eye(N)', 'torch.zeros(N, N)', CDC),
    ('a γ for the first layer too', 'ivpt.py', 'repeat(L - 1, 1, 1)', 'repeat(L, 1, 1)', COUNTS),
    ('P starts within a bound of p and not p²', 'ivpt.py', '3 * vit.patch_size ** 2 + D', '3 * vit.patch_size + D', CDC),
    # 3.4, re-weighting
    ('Eq. 7 with sqrt(D)', 'ivpt.py', '.squeeze(-1) / q.shape[-1] ** 0.5)', '.squeeze(-1) / p.shape[-1] ** 0.5)', ALPHA),
    ('Eq. 7 without its scale', 'ivpt.py', '.squeeze(-1) / q.shape[-1] ** 0.5)', '.squeeze(-1))', ALPHA),
    ('Eq. 10 with w and α̃ exchanged', 'ivpt.py', 'attention_weight(q, W_K, p), attention_weight(q, W_K, p_previous)',
     'attention_weight(q, W_K, p_previous), attention_weight(q, W_K, p)', ALPHA),
    ('Eq. 12 with γ_ji', 'ivpt.py', 'gamma.unsqueeze(-1) * p_previous', 'gamma.mT.unsqueeze(-1) * p_previous', ALPHA),
    ('Eq. 12 with γ outside of the exponential', 'ivpt.py', 'return attention_weight(q, W_K, p), alpha.unflatten(-1, gamma.shape[-2:])',
     'return attention_weight(q, W_K, p), gamma * attention_weight(q, W_K, p_previous).unsqueeze(-2)', ALPHA),
    # 3.3 and 3.4, seen from the optimiser
    ('optimiser: CDC is a mean of two layers', 'ivpt.py', 'P[1:] + P[:-1]])', '(P[1:] + P[:-1]) / 2])', OPTIMISER),
    ('optimiser: CDC subtracts', 'ivpt.py', 'P[1:] + P[:-1]])', 'P[1:] - P[:-1]])', OPTIMISER),
    ('optimiser: CDC learns from its own layer alone', 'ivpt.py', 'P[1:] + P[:-1]])', 'P[1:] + P[:-1].detach()])', OPTIMISER),
    ('optimiser: vanilla CDC learns from its own layer alone', 'ivpt.py', 'return P.cumsum(dim=0)',
     'return P + P.detach().cumsum(dim=0) - P.detach()', OPTIMISER),
    ('optimiser: vanilla CDC is a mean of the layers so far', 'ivpt.py', 'return P.cumsum(dim=0)',
     'return P.cumsum(dim=0) / torch.arange(1, 1 + len(P)).view(-1, 1, 1)', OPTIMISER),
    ('optimiser: vanilla CDC does not reach the last layer', 'ivpt.py', 'return P.cumsum(dim=0)',
     'return torch.cat([P[:-1].cumsum(dim=0), P[-1:]])', OPTIMISER),
    ('optimiser: γ acts on its own layer', 'ivpt.py', 'psi(gamma, P[:-1])', 'psi(gamma, P[1:])', OPTIMISER),
    ('optimiser: γ of the layer before', 'ivpt.py', 'psi(gamma, P[:-1])', 'psi(gamma.roll(1, 0), P[:-1])', OPTIMISER),
    ('optimiser: γ learns nothing', 'ivpt.py', 'return gamma @ P', 'return gamma.detach() @ P', OPTIMISER),
    ('optimiser: γ is normalised', 'ivpt.py', 'return gamma @ P', 'return gamma.softmax(-1) @ P', OPTIMISER),
    ('optimiser: prompts are normalised before they enter', 'ivpt.py', 'P_hat = self.prompts().unbind()',
     'P_hat = (self.prompts() / self.prompts().norm()).unbind()', OPTIMISER),
    ('optimiser: P starts with half of the bound', 'ivpt.py', 'uniform_(-bound, bound)', 'uniform_(-bound / 2, bound / 2)', OPTIMISER),
    ('optimiser: γ starts with ones everywhere', 'ivpt.py', 'torch.eye(N)', 'torch.ones(N, N)', OPTIMISER),
    ('optimiser: the cosine stops half-way', 'train.py', 'math.cos(math.pi * (', 'math.cos(math.pi / 2 * (', OPTIMISER),
    ('optimiser: AR at tokens that no image has a part in', 'ivpt.py', 'w.topk(k, dim=-1).indices',
     'torch.arange(k, device=w.device).expand(*w.shape[:-1], k)', OPTIMISER),
    ('optimiser: AR adds nothing', 'ivpt.py', 'P_re.expand(B, k, D)', '0 * P_re.expand(B, k, D)', OPTIMISER),
    # 3.5, AR
    ('Top-k of the smallest', 'ivpt.py', 'w.topk(k, dim=-1)', 'w.topk(k, dim=-1, largest=False)', AR),
    ('Top-k in ascending order', 'ivpt.py', 'w.topk(k, dim=-1).indices', 'w.topk(k, dim=-1).indices.flip(1)', AR),
    ('P_re in the order of position', 'ivpt.py', 'w.topk(k, dim=-1).indices', 'w.topk(k, dim=-1).indices.sort(dim=1).values', AR),
    ('the same Ω for all images of a batch', 'ivpt.py', 'w.topk(k, dim=-1)', 'w.mean(0, keepdim=True).expand_as(w).topk(k, dim=-1)', AR),
    ('Eq. 15 puts P_re in the place of Z', 'ivpt.py', 'Z.scatter_add_(', 'Z.scatter_(', AR),
    ('Eq. 15 subtracts', 'ivpt.py', 'P_re.expand(B, k, D)', '-P_re.expand(B, k, D)', AR),
    ('Eq. 15 adds the first row of P_re everywhere', 'ivpt.py', 'P_re.expand(B, k, D)', 'P_re[:1].expand(B, k, D)', AR),
    ("the class token's offset is forgotten", 'ivpt.py', 'reinforce_(tokens, 1 + Omega', 'reinforce_(tokens, Omega', AR),
    ('the class token competes for saliency', 'ivpt.py', 'w[:, 1:1 + self.M]', 'w[:, :self.M]', AR),
    ('prompts compete for saliency', 'ivpt.py', 'w[:, 1:1 + self.M]', 'w[:, -self.M:]', AR),
    ('P_re of another layer', 'ivpt.py', 'self.P_re[l])', 'self.P_re[l - 1])', AR),
    ('P_re of the first layer in all', 'ivpt.py', 'self.P_re[l])', 'self.P_re[0])', AR),
    ('AR with saliency that is one layer old', 'ivpt.py', 'tokens, w = layer(tokens, P_hat[l], need_weights=self.P_re is not None)',
     'w_old = w if l else None; tokens, w = layer(tokens, P_hat[l]); w, w_new = (w if w_old is None else w_old), w', AR),
    ('AR after every layer, the last one included', 'ivpt.py', 'torch.zeros(L - 1, k, D)', 'torch.zeros(L, k, D)', AR),
    ('P_re does not start at 0', 'ivpt.py', 'torch.zeros(L - 1, k, D)', 'torch.randn(L - 1, k, D)', AR),
    ('AR reinforces before the layer', 'ivpt.py', 'tokens, w = layer(tokens, P_hat[l], need_weights=self.P_re is not None)',
     '_, w = layer(tokens, P_hat[l]); before = tokens; tokens, _ = layer(before if self.P_re is None else reinforce_(before, '
     '1 + top_k(w[:, 1:1 + self.M], self.k), self.P_re[l]), P_hat[l])', AR),
    ('attention weights that nobody reads', 'ivpt.py', 'need_weights=self.P_re is not None', 'need_weights=True', AR),
    ('attention weights that the plain ViT does not read', 'vit.py', 'layer(tokens, need_weights=False)', 'layer(tokens)', AR),
    # the model
    ('the prompts of another layer', 'ivpt.py', 'layer(tokens, P_hat[l], ', 'layer(tokens, P_hat[l - 1], ', CDC),
    ('P in the place of P̂', 'ivpt.py', 'P_hat = self.prompts()', 'P_hat = self.P', CDC),
    ('the last layer without prompts', 'ivpt.py', 'last(tokens, P_hat[-1])', 'last(tokens)', CDC),
    ('the last layer without image tokens', 'vit.py', 'context = others, *context', 'pass', CDC),
    ('the head reads what the last LayerNorm has not seen', 'ivpt.py', 'self.head(self.vit.read(self.vit.last(tokens, P_hat[-1])))', 'self.head(self.vit.last(tokens, P_hat[-1])[:, 0])', CDC),
    ('the backbone is left trainable', 'ivpt.py', 'vit.requires_grad_(False)', 'vit', LOOP),
    ('the backbone leaves eval mode', 'ivpt.py', '        self.vit.eval()\n', '', VPT),
    ('no prompts are allowed', 'ivpt.py', 'N < 1 or', 'N < 0 or', INPUT),
    ('more reinforcing prompts than image tokens are allowed', 'ivpt.py', '0 <= k <= vit.M', '0 <= k <= 10 * vit.M', INPUT),
    # 4.3, the other structures
    ('vanilla CDC sums the layers that follow', 'ivpt.py', 'return P.cumsum(dim=0)', 'return P.flip(0).cumsum(dim=0).flip(0)', STRUCT),
    ('vanilla CDC sums prompts of one layer', 'ivpt.py', 'return P.cumsum(dim=0)', 'return P.cumsum(dim=1)', STRUCT),
    ('vanilla CDC leaves out its own prompts', 'ivpt.py', 'return P.cumsum(dim=0)', 'return P.cumsum(dim=0) - torch.cat([0 * P[:1], P[1:]])', STRUCT),
    ('ProVP adds the prompts of the layer before', 'ivpt.py', 'add_last(tokens, self.P[l])', 'add_last(tokens, self.P[l - 1])', STRUCT),
    ('ProVP adds P^0 twice', 'ivpt.py', "self.structure == 'provp' and l > 0", "self.structure == 'provp'", STRUCT),
    ('ProVP replaces what is inherited, as VPT does', 'ivpt.py', 'tokens = add_last(tokens, self.P[l])',
     'tokens = torch.cat([tokens[:, :-self.P.shape[1]], self.P[l].expand(len(tokens), -1, -1)], dim=1)', STRUCT),
    ('residuals are added where the class token stands', 'ivpt.py', '(0, 0, x.shape[1] - len(P), 0)', '(0, 0, 0, x.shape[1] - len(P))', STRUCT),
    ('EXPRESS adds before LayerNorm', 'ivpt.py', 'add_last(layer.norm1(tokens), self.norm1)', 'layer.norm1(add_last(tokens, self.norm1))', STRUCT),
    ('EXPRESS adds before the projection after MSA', 'ivpt.py', 'add_last(layer.attn.proj(attended), self.proj)', 'layer.attn.proj(add_last(attended, self.proj))', STRUCT),
    ('EXPRESS without its residual on qkv', 'ivpt.py', 'add_last(layer.attn.qkv(x), self.qkv)', 'layer.attn.qkv(x)', STRUCT),
    ('EXPRESS with the residuals of one layer in all', 'ivpt.py', 'self.express[l](layer', 'self.express[0](layer', STRUCT),
    ('EXPRESS does not start as VPT-shallow', 'ivpt.py', 'self.proj = nn.Parameter(torch.zeros(N, D))', 'self.proj = nn.Parameter(torch.ones(N, D))', STRUCT),
    ("EXPRESS's weights are those of the last token", 'ivpt.py', 'layer.attn.first_row(q, k)', 'layer.attn.first_row(q.flip(2), k)', STRUCT),
    ('look: the first tokens are taken for the prompts', 'ivpt.py', '[..., -P.shape[1]:, :]', '[..., :P.shape[1], :]', LOOK),
    ('look: Ω of top-k where all tokens are reinforced', 'ivpt.py', "'') == 'topk' else None", "'') != 'none' else None", LOOK),
    ('AR at all tokens, in the wrong order', 'ivpt.py', 'torch.arange(w.shape[-1], device=w.device)', 'torch.arange(w.shape[-1], device=w.device).flip(0)', STRUCT),
    ('BitFit without the head', 'train.py', "name.endswith('.bias') or name.startswith('head.')", "name.endswith('.bias')", STRUCT),
    ('CDC of the image', 'ivpt.py', 'layer(tokens, P_hat[l], ', 'layer(tokens, P_hat[l] + tokens[:, :1].detach(), ', CDC),
    ('the last layer does not see inherited prompts', 'ivpt.py', 'self.vit.last(tokens)', 'self.vit.last(tokens[:, :1 + self.M])', STRUCT),
    ('AR "All" from the last position to the first', 'ivpt.py', 'torch.arange(w.shape[-1], device=w.device)', 'torch.arange(w.shape[-1], device=w.device).flip(0)', STRUCT),
    ('AR "All" with k rows', 'ivpt.py', "k = vit.M if reinforcement == 'all' else k", "k = min(k, vit.M)", STRUCT),
    ('AR with inherited prompts is ignored', 'ivpt.py', "if reinforcement != 'none' and structure in INHERITED", 'if False', STRUCT),
    ('bias tuning trains no LayerNorm', 'train.py', "name.endswith('.bias') or", "name.endswith('.bias') and 'norm' not in name or", STRUCT),
    ('bias tuning trains no head', 'train.py', "name.endswith('.bias') or name.startswith('head.')", "name.endswith('.bias')", STRUCT),
    # what is read; number formats; k = 0; names
    ('readout: the norm stands before the mean', 'vit.py', 'return self.norm(tokens[:, 0] if', 'return (self.norm(tokens)[:, 0] if',
     'test_3_1_timm'),
    ('readout: the class token has a part in the mean', 'vit.py', 'tokens[:, 1:1 + self.M].mean', 'tokens[:, :1 + self.M].mean', VPT),
    ('readout: inherited prompts have a part in the mean', 'vit.py', 'tokens[:, 1:1 + self.M].mean', 'tokens[:, 1:].mean', VPT),
    ('readout: the largest and not the mean', 'vit.py', '1 + self.M].mean(dim=1)', '1 + self.M].amax(dim=1)', VPT),
    ('readout: the image tokens of the last layer do not ask', 'vit.py', "        if self.readout == 'cls':\n", '        if True:\n', VPT),
    ('readout: all tokens of the last layer ask though z_cls alone is read', 'vit.py', "        if self.readout == 'cls':\n",
     '        if False:\n', VPT),
    ('readout: a model has always cls', 'vit.py', '*SIZES[size], num_classes, readout)', '*SIZES[size], num_classes)', FILES),
    ('readout: the setting is ignored', 'train.py', ',\n                      config.readout)', ')', FILES),
    ('readout: MAE by its class token', 'configs.yaml', '    readout: mean ', '    readout: cls ', FILES),
    ('readout: any word is cls', 'vit.py', " or readout not in ('cls', 'mean')", '', VPT),
    ('formats: the row of Eq. 14 is in bfloat16', 'vit.py', 'x.to(torch.promote_types(x.dtype, torch.float32))', 'x', AR),
    ('formats: autocast goes on in the row of Eq. 14', 'vit.py', "torch.autocast(q.device.type.replace('meta', 'cpu'), enabled=False)",
     'torch.autocast(q.device.type, torch.bfloat16)', AR),
    ('formats: the one query is in bfloat16', 'vit.py', "with torch.autocast(token.device.type.replace('meta', 'cpu'), enabled=False)", 'if True', AR),
    ('formats: one query fails on tokens that are half', 'vit.py', '[y.to(self.qkv.weight.dtype) for', '[y for', AR),
    ('formats: residuals of EXPRESS leave autocast', 'ivpt.py', 'F.pad(P.to(x.dtype)', 'F.pad(P', AR),
    ('formats: written out without its scale', 'vit.py', '(q / q.shape[-1] ** 0.5 @ k.mT)', '(q @ k.mT)', VPT),
    ('formats: written out everywhere on a CPU', 'vit.py', 'if q.dtype == torch.bfloat16 and q.', 'if q.', VPT),
    ('formats: fused everywhere', 'vit.py', 'if q.dtype == torch.bfloat16 and q.', 'if False and q.', VPT),
    ('k = 0 is AR without a row', 'ivpt.py', "if reinforcement == 'topk' and k == 0", 'if False', AR),
    ('a head starts as torch starts it', 'ivpt.py', '        init_linear(self.head)\n', '', FILES),
    ('a head starts ten times too large', 'vit.py', 'trunc_normal_(module.weight, std=0.02)', 'trunc_normal_(module.weight, std=0.2)', FILES),
    ("names: Hugging Face's queries for keys", 'vit.py', "in ('query', 'key', 'value')", "in ('key', 'query', 'value')", DIALECTS),
    ("names: Hugging Face's two norms of a layer exchanged", 'vit.py', [("before': 'norm1'", "before': 'norm2'"), ("after': 'norm2'",
     "after': 'norm1'")], None, DIALECTS),
    ("names: Hugging Face's pooler is left over", 'vit.py', ", 'pooler.')", ')', DIALECTS),
    ('names: no prefix is removed', 'vit.py', 'state = without_prefix(state)', 'pass', DIALECTS),
    ('names: any prefix is removed', 'vit.py', '(((model|backbone|module|encoder|vit)', '(((\\w+)', DIALECTS),
    ('names: one of two ViTs is taken', 'vit.py', 'if len(prefixes) == 1 else {}', 'if prefixes else {}', DIALECTS),
    ('names: one of two heads is taken', 'vit.py', 'return plain if len(plain) == len(state)', 'return plain if plain', DIALECTS),
    ('names: a model that was pickled is to be downloaded again', 'vit.py', "'' if 'state_dict()' in", "'' if 'never' in",
     FILES),
    ('names: a safetensors header in the order of the tensors alone', 'vit.py', "sorted(header.items(), key=lambda item: item[1]['data_offsets'])",
     'header.items()', 'test_weights_files'),
    # the exercises
    ('exercise: the docstring goes too', 'tests/exercise.py', 'if ast.get_docstring(node) is None:', 'if True:', EXERCISE),
    ('exercise: the body stays', 'tests/exercise.py', "    (folder / exercise.file).write_text(text, encoding='utf-8')\n", '', EXERCISE),
    ('exercise: a false sentence has status 0', 'tests/exercise.py', 'return int(bool(false or trouble or not passed))', 'return 0', EXERCISE),
    ('exercise: a folder that is not empty is written into', 'tests/exercise.py', ' or any(folder.iterdir())', '', EXERCISE),
    ('exercise: the smallest case is not told', 'tests/exercise.py', "(?:case|example): ", 'no such words: ', EXERCISE),
    ('exercise: the tests of another exercise', 'tests/exercise.py', '*exercise.tests]', "'tests/test_bench.py']", EXERCISE),
    ('exercise: nothing has run, and all is right', 'tests/exercise.py', 'trouble or not passed', 'False', EXERCISE),
    ('exercise: one of two functions is left as it is', 'tests/exercise.py', 'for name in exercise.functions:\n        source',
     'for name in exercise.functions[:1]:\n        source', EXERCISE),
    # 4.1, the loop
    ('warm-up is off by one', 'train.py', 'return (step + 1) / rising', 'return step / rising', LOOP),
    ('warm-up is one step too long', 'train.py', 'if step < rising', 'if step <= rising', LOOP),
    ('the cosine stops half-way', 'train.py', 'math.cos(math.pi * (', 'math.cos(math.pi / 2 * (', LOOP),
    ('the cosine starts at step 0', 'train.py', '(step - rising) / (steps - rising)', 'step / steps', LOOP),
    ('gradients add up over steps', 'train.py', '            optimizer.zero_grad()\n', '', LOOP),
    ('SGD without momentum', 'train.py', 'config.lr, config.momentum, weight', 'config.lr, weight', LOOP),
    ('SGD without weight decay', 'train.py', 'momentum, weight_decay=config.weight_decay', 'momentum', LOOP),
    ('the learning rate does not follow the schedule', 'train.py', "group['lr'] = lr\n", "group['lr'] = config.lr\n", LOOP),
    ('labels are smoothed', 'train.py', 'F.cross_entropy(replica(images), labels)', 'F.cross_entropy(replica(images), labels, label_smoothing=0.1)', LOOP),
    ('a loss that is not a number goes on', 'train.py', 'if not math.isfinite(loss)', 'if False', LOOP),
    ('the seed is ignored', 'train.py', 'torch.manual_seed(config.seed)', 'torch.manual_seed(0)', LOOP),
    ('linear probing trains the whole backbone', 'train.py', 'model.requires_grad_(False).head', 'model.head', LOOP),
    ('the backbone is saved with the prompts', 'train.py', 'model.named_parameters() if p.requires_grad}', 'model.named_parameters()}', LOOP),
    ('val images are trained on when val is scored', 'train.py', '(task.train, task.val)', '(task.train + task.val, task.val)', LOOP),
    ('val images are left out of the final run', 'train.py', '(task.train + task.val, task.test)', '(task.train, task.test)', LOOP),
    ('test images are trained on', 'train.py', '(task.train + task.val, task.test)', '(task.train + task.val + task.test, task.test)', LOOP),
    ('the best epoch is reported, not the last', 'train.py',
     [('records.append(record)', "records.append(record); config.best = max(getattr(config, 'best', 0), accuracy(model, score, config, device))"),
      ("'accuracy': accuracy(model, score, config, device)", "'accuracy': config.best")], None, LOOP),
    # the data
    ('val images are among the training images', 'data.py', 'return chosen[n_val:]', 'return chosen', DATA),
    ('the draw depends on nothing that is fixed', 'data.py', 'torch.Generator().manual_seed(0)).tolist()', 'None).tolist()', DATA),
    ('every image is flipped', 'data.py', '.lt(0.5)', '.lt(1.5)', DATA),
    ('crops and flips where the task forbids them', 'data.py', "if epoch is None or config.augment == 'none'", 'if epoch is None', DATA),
    ('the last offset of a crop is never reached', 'data.py', 'int(top * (image.shape[1] - size + 1))', 'int(top * (image.shape[1] - size))', DATA),
    ('test images are augmented', 'data.py', "if epoch is None or config.augment == 'none'", "if config.augment == 'none'", DATA),
    ('every epoch is the same', 'data.py', 'config.seed + (epoch or 0)', 'config.seed', DATA),
    ('mean and std are not in units of 255', 'data.py', '(255 * torch.tensor(x, device', '(torch.tensor(x, device', DATA),
    ('the test split is the training split', 'data.py', '(train, val, splits[1])', '(train, val, splits[0])', DATA),
    ('class ids count from 1', 'data.py', "line {number}'), label))", "line {number}'), label - 1))", DATA),
    # the data sets
    ('a name in a list may lead out of the folder', 'data.py', " or '..' in Path(name).parts", '', FORMATS),
    ('what differs from the paper is not noted', 'data.py', 'if len(samples) != n:', 'if False:', FORMATS),
    ('the images that are held out are trained on', 'data.py', 'splits = samples[config.n_test:],', 'splits = samples,', FORMATS),
    ('what is held out depends on the order on disk', 'data.py', 'shuffled(sorted(samples))', 'shuffled(samples)', FORMATS),
    ("CLEVR's class is the number of objects", 'data.py', 'first = 3 if', 'first = 0 if', FORMATS),
    ("Caltech101's background is left out", 'data.py', "if name == 'Caltech101':", 'if False:', FORMATS),
    ('classes of FGVC in the order of the list', 'data.py', 'enumerate(sorted({label for _, label in parts[0]}))',
     'enumerate(dict.fromkeys(label for _, label in parts[0]))', FORMATS),
    ('a JSON list may name an image twice', 'data.py', 'object_pairs_hook=tuple', 'object_pairs_hook=lambda x: tuple(dict(x).items())', FORMATS),
    ("classes of a folder's test are counted in test", 'data.py', '(file, classes.index(names[label]))', '(file, label)', FORMATS),
    ("a folder's val is trained on before the final run", 'data.py', 'train[:len(train) // 5], train[len(train) // 5:]', 'train[:len(train) // 5], train', FORMATS),
    ('a circle of links multiplies the images', 'data.py', 'if len({os.path.realpath(file)', 'if False and len({os.path.realpath(file)', FORMATS),
    ('a link to a folder of images is refused', 'data.py', "Path(name).is_absolute() or", 'not (folder / name).resolve().is_relative_to(folder.resolve()) or', FORMATS),
    ('an error does not say which image of an array it was', 'data.py', ', image {self.index}', '', FORMATS),
    ('only the first of two sets is checked', 'data.py', "in getattr(pictures, 'datasets', [pictures])", "in getattr(pictures, 'datasets', [pictures])[:1]", FORMATS),
    ('every run checks every image again', 'data.py', 'look = cache(lambda', 'look = (lambda', FORMATS),
    ('KITTI is cropped and flipped', 'configs.yaml', 'n_test: 711, N: 50, k: 10, augment: none', 'n_test: 711, N: 50, k: 10', FORMATS),
    # what tells pictures from others
    ('a digest does not see the order of pictures', 'data.py', 'sha256(repr(x).encode())', 'sha256(repr(sorted(x)).encode())', DATA),
    ('a digest holds where the data folder is', 'data.py', 'os.path.relpath(picture, folder), ', 'str(picture), ', DATA),
    ('a digest does not see the size of a file', 'data.py', 'os.path.getsize(picture)', '0', DATA),
    ('a digest does not see pictures in memory', 'data.py', 'hashlib.sha256(picture.numpy()).hexdigest()', "'picture'", DATA),
    # files and threads
    ('16 bits are clipped to 8', 'data.py', "image.mode.startswith('I;16') or ", '', DATA),
    ('16 bits in 32 are refused', 'data.py', "or (image.mode, format) == ('I', 'PNG')", '', DATA),
    ('levels of 32 bits become black and white', 'data.py', "image.mode in ('I', 'F')", 'False', DATA),
    ('pictures fill a GPU', 'data.py', "mem_get_info(device)[0] / 2", "mem_get_info(device)[0]", DATA),
    ('test pictures are not kept', 'train.py', "data.in_memory(score, config, torch.device('cpu'))", 'score', DATA),
    ('a batch waits for the GPU', 'data.py', 'non_blocking=pinned', 'non_blocking=False', DATA),
    ('a batch is not pinned', 'data.py', '(x.pin_memory() if pinned else x)', 'x', DATA),
    ('all is decoded ahead', 'data.py', 'islice(rest, 2 * workers)', 'islice(rest, 10 ** 6 * workers)', DATA),
    ('nothing is decoded ahead', 'data.py', 'islice(rest, 2 * workers)', 'islice(rest, 1 * bool(workers))', DATA),
    ('threads go on after Ctrl-C', 'data.py', 'pool.shutdown(cancel_futures=True)', 'pool.shutdown(wait=False)', DATA),
    ('without threads there is no picture', 'data.py', 'waiting, rest = deque(), iter(requests)', 'waiting = deque()', DATA),
    ('a machine without threads is said each epoch', 'data.py', 'warn = cache(log.warning)', 'warn = log.warning\nwarn.__func__.cache_clear = int', DATA),
    ('each process of a machine takes all CPUs', 'data.py', " // int(os.environ.get('LOCAL_WORLD_SIZE', 1))", '', DATA),
    ('auto is more than 8 threads', 'data.py', 'min(8, cpus)', 'cpus', DATA),
    ('a flip depends on where the window is', 'data.py', 'draws[:, 2].lt(0.5)', 'draws[:, 0].lt(0.5)', DATA),
    ('epochs of different seeds are the same', 'data.py', '1_000_003 * config.seed + (epoch or 0)', 'config.seed + (epoch or 0)', DATA),
    ('a list may not end in a blank line', 'data.py', ".read_text(encoding='utf-8-sig').rstrip()", ".read_text(encoding='utf-8-sig')", FORMATS),
    ('a list may not have tabs', 'data.py', '[^ \\t])[ \\t]+', '[^ \\t]) ', FORMATS),
    ('a byte-order mark belongs to the first name', 'data.py', "path.read_text(encoding='utf-8-sig').rstrip", "path.read_text(encoding='utf-8').rstrip", FORMATS),
    ('a hidden folder is a class', 'data.py', 'entry.is_dir() and not HIDDEN.match(entry.name)', 'entry.is_dir()', FORMATS),
    ('a hidden file is an image', 'data.py', 'not HIDDEN.search(os.path.relpath(file, path))', 'True', FORMATS),
    ('files that are left out are not told', 'data.py', 'if others := [', 'if others := [] and [', FORMATS),
    ('a class of files that are no images is a class', 'data.py', 'if empty := sorted(', 'if empty := [] and sorted(', FORMATS),
    ('a class without test images is not told', 'data.py', 'if missing := sorted(set(range(len(classes)))', 'if missing := [] and sorted(set(range(len(classes)))', FORMATS),
    # many runs
    ('a search scores on the test images', 'train.py', "{'score_on': 'val', 'point': f'search", "{'score_on': 'test', 'point': f'search", SWEEPS),
    ('of equal points the larger learning rate wins', 'train.py', "-row[0].get('lr', 0))", "row[0].get('lr', 0))", SWEEPS),
    ('a search takes the worst point', 'train.py', "row[0].get('lr', 0)), reverse=True)", "row[0].get('lr', 0)))", SWEEPS),
    ('a GPU without memory ends in a traceback', 'train.py', '        except (InputError, torch.OutOfMemoryError) as', '        except InputError as', INPUT),
    ('a report takes all seeds', 'train.py', '(models, tasks, methods, seeds)))', '(models, tasks, methods, None)))', SWEEPS),
    ('pictures in memory stay on the CPU', 'data.py', '(image.to(device), label)', '(image.clone(), label)', DATA),
    ('a point that diverges ends the search', 'train.py', 'if config.point and isinstance(error, Diverged)', 'if False', SWEEPS),
    ('every seed searches for itself', 'train.py', 'first.setdefault((config.task, config.model, config.method), config)',
     'first[config.task, config.model, config.method] = config', SWEEPS),
    ('what the search found is not used', 'train.py', 'vars(config).update(best[key])', 'pass', SWEEPS),
    ('the mean of groups is the mean of tasks', 'train.py', "for member in configs['groups'][name]]",
     "for member in tasks_of(configs, [name])]", SWEEPS),
    ('a missing task is left out of its mean', 'train.py', "members = [value(member, method, seed) for member in configs['groups'][name]]",
     "members = [x for m in configs['groups'][name] if (x := value(m, method, seed)) is not None]", SWEEPS),
    ('validation accuracies are reported', 'train.py', " and result['score_on'] == 'test' and", ' and', SWEEPS),
    ("the difference is the paper's less ours", 'train.py', '100 * fmean(x) - y:+.1f', 'y - 100 * fmean(x):+.1f', SWEEPS),
    ('noise is added and not mixed in', 'train.py', '(1 - noise) * images + noise', 'images + noise', SWEEPS),
    ('noise is another for every model', 'train.py', 'torch.Generator().manual_seed(0)', 'torch.Generator().manual_seed(torch.seed() % 99)', SWEEPS),
    ('accuracies under noise replace those before', 'train.py', "{'noise': result.get('noise', {}) | scores}", "{'noise': scores}", SWEEPS),
    # interruptions and the files of a run
    ('a run: random numbers do not depend on the epoch', 'train.py', '1_000_003 * config.seed + epoch', '1_000_003 * config.seed', STOPS),
    ('a run: random numbers of an epoch go on from what was drawn before', 'train.py',
     'torch.manual_seed(1_000_003 * config.seed + epoch)', 'pass', STOPS),
    ('a run: the optimizer starts anew after an interruption', 'train.py', "    optimizer.load_state_dict(newest['optimizer'])\n", '', STOPS),
    ('a run: the parameters start anew after an interruption', 'train.py', "    model.load_state_dict(newest['trained'], strict=False)\n",
     '', STOPS),
    ('a run: the older checkpoint is taken', 'train.py', 'newest = max(found', 'newest = min(found', STOPS),
    ('a run: only one checkpoint is kept', 'train.py', 'CHECKPOINTS[len(records) % 2]', 'CHECKPOINTS[0]', STOPS),
    ("a run: a checkpoint's digest is not compared", 'train.py', 'if digest(content[64:]).encode() != content[:64]', 'if False', STOPS),
    ("a run: a result's digest is not compared", 'train.py', "if result['digest'] == digest(", "if True or result['digest'] == digest(", STOPS),
    ('a run: the result is written before the parameters', 'train.py', "    write(folder / 'params.pth', params)\n"
     '    write_result(folder, result)\n', "    write_result(folder, result)\n    write(folder / 'params.pth', params)\n", STOPS),
    ('a run: a run goes on with other settings', 'train.py', 'if changed := differences(old, vars(config))', 'if False', STOPS),
    ('a run: a finished run is run again', 'train.py', 'if not again and (result', 'if False and (result', STOPS),
    ('a run: the log has the last epoch alone', 'train.py', 'for record in records).encode()', 'for record in records[-1:]).encode()', STOPS),
    ('a run: the log is not written again after an interruption', 'train.py', "    write_log(place, records)", '    pass', STOPS),
    ('a run: SIGTERM has the status of Ctrl-C', 'train.py', 'stop.status = 128 + number', 'stop.status = 130', STOPS),
    ('a run: what is set aside is deleted', 'train.py', 'path.replace(aside)', 'path.unlink()', STOPS),
    ('a run: a mistake is said once a run', 'train.py', 'if str(error) not in said', 'if True', STOPS),
    ('a run: a name in configs.yaml may be a path', 'train.py', 'if not all(re.fullmatch(', 'if False and all(re.fullmatch(', FUZZ),
    # Figure 7
    ('Figure 7: Ω of the layer before', 'ivpt.py', "seen['Omega'][0, l].tolist()", "seen['Omega'][0, l - 1].tolist()", LOOK),
    ('Figure 7: the maps in the order from the last layer', 'ivpt.py', "enumerate(seen['w'][0].float().cpu())",
     "enumerate(seen['w'][0].flip(0).float().cpu())", LOOK),
    ('Figure 7: a map over a black picture', 'ivpt.py', 'row.append(heat_map(row[0], w', 'row.append(heat_map(0 * row[0], w', LOOK),
    ('Figure 7: every row has the maps of the first picture', 'train.py', 'seen = ivpt.look(model, image)',
     'seen = seen if i else ivpt.look(model, image)', LOOK),
    ('Figure 7: every row has the first picture', 'train.py', 'row = ivpt.tiles(image,',
     'first = first if i else image; row = ivpt.tiles(first,', LOOK),
    ('Figure 7: the picture is not de-normalised', 'ivpt.py', 'image[0] * std + mean', 'image[0]', LOOK),
    ('Figure 7: the picture is de-normalised by the standard deviation alone', 'ivpt.py', 'image[0] * std + mean', 'image[0] * std', LOOK),
    ('Figure 7: the class with the smallest logit is named first', 'train.py', '.topk(min(5, len(classes)))',
     '.topk(min(5, len(classes)), largest=False)', LOOK),
    ('Figure 7: the second class is named in the picture', 'train.py', '{classes[best[0]]}', '{classes[best[1]]}', LOOK),
    ('Figure 7: the truth is the class that is named', 'train.py', 'in truth {classes[label]}', 'in truth {classes[best[0]]}', LOOK),
    ('Figure 7: the images of a run stand together', 'train.py', '    rows.sort(key=lambda row: row[0])', '    # ', LOOK),
    ('Figure 7: training images are shown', 'train.py', 'test = task_of(config, folder).test\n', 'test = task_of(config, folder).train\n', LOOK),
    ('Figure 7: the last test images are shown', 'train.py', '[test[i] for i in range(min(4, len(test)))]', '[test[-1 - i] for i in range(4)]', LOOK),
    ('Figure 7: a photo is squeezed and not cropped', 'train.py', 'data.read_image(file, data.resized(config))',
     'data.read_image(file, 2 * (config.img_size,))', LOOK),
    ('Figure 7: a photo is augmented', 'train.py', 'next(data.batches([(image, label)], config, device))',
     'next(data.batches([(image, label)], config, device, 0))', LOOK),
    # what no test saw
    ('unseen: noise depends on the seed', 'train.py', 'torch.Generator().manual_seed(0)', 'torch.Generator().manual_seed(config.seed)', SWEEPS),
    ('unseen: noise is the same for every batch', 'train.py', 'generator=generator).to(device)',
     'generator=torch.Generator().manual_seed(0)).to(device)', SWEEPS),
    *[(f'unseen: {name} is free', 'train.py', "FREE = {'data', ", f"FREE = {{'data', '{name}', ", STOPS)
      for name in ('precision', 'mean', 'n_test', 'score_on', 'save_dtype', 'k')],
    *[(f'unseen: {name} is not free', 'train.py', f"'{name}', ", '', STOPS) for name in ('point', 'cache_gb', 'grid')],
    ('unseen: settings that only the older run has are not compared', 'train.py', '(old.keys() | new.keys())', 'new.keys()', STOPS),
    ('unseen: settings that only the new run has are not compared', 'train.py', '(old.keys() | new.keys())', 'old.keys()', STOPS),
    ('unseen: --again does not search again', 'train.py', 'result = run(config, again)', 'result = run(config, again and not config.point)', SWEEPS),
    ('unseen: test images are not checked before training', 'train.py', "data.in_memory(score, config, torch.device('cpu'))", 'score', INPUT),
    ("unseen: the paper's figure beside a validation accuracy", 'train.py', "config.paper_accuracy if config.score_on == 'test' else 0",
     'config.paper_accuracy', LOOP),
    ('unseen: Ctrl-C keeps a part of an epoch', 'train.py', "        where = f'in epoch {len(records) + 1}",
     "        save(folder, model, optimizer, records, config, device)\n        where = f'in epoch {len(records) + 1}", STOPS),
    ('unseen: two processes write into the same file', 'train.py', '.{os.getpid()}.{time.monotonic_ns()}.part', '.part', STOPS),
    ('unseen: SIGTERM is not handled', 'train.py', '    signal.signal(signal.SIGTERM, terminate)\n', '', STOPS),
    # what a run belongs to
    ('belongs: labels are not', 'data.py', '(*identity(picture, config.data), label)', '(*identity(picture, config.data), 0)', IDENTITY),
    ('belongs: sizes are not', 'data.py', 'os.path.getsize(picture)', '0', IDENTITY),
    ('belongs: names are whole paths', 'data.py', 'os.path.relpath(picture, folder)', 'str(picture)', IDENTITY),
    ('belongs: the classes are not', 'data.py', "{'class names': task.classes}", '{}', IDENTITY),
    ('belongs: the backbone is its path', 'train.py', "backbone=backbone_digest(model))", 'backbone=config.weights)', IDENTITY),
    ('belongs: --noise takes any pictures', 'train.py', '    now = data.digest(task, config)\n', '    now = {}\n', IDENTITY),
    ('belongs: --show takes any backbone', 'train.py', '(now := backbone_digest(model)) != config.backbone', '(now := 1) > 2', IDENTITY),
    ('belongs: a whole model needs its first weights', 'train.py', "if config.tune == 'all':  # params", "if False:  # params", IDENTITY),
    ('belongs: --show forgets --weights', 'train.py', "for name in ('data', 'weights')})", "for name in ('data',)})", IDENTITY),
    ('a random backbone need not be asked for', 'train.py', '    if not weights:\n', '    if False:\n', INPUT),
    ('a random backbone is not called so', 'train.py', "', random weights' if", "'' if", INPUT),
    ('a suffix that no entry has is taken', 'train.py', "if '.' in name or name in", 'if name in', INPUT),
    ("the paper's numbers beside any file", 'train.py', "Path(config['weights'].partition('#')[0]).name != Path(weights).name", 'False', SWEEPS),
    ("the paper's numbers beside any image size", 'train.py', "config['img_size'] != vit.parse_name(config['model'])[2]", 'False', SWEEPS),
    ('a damaged result is passed over', 'train.py', '            whole = False\n', '', SWEEPS),
    ('what runs differ in is not said', 'train.py', '        if len(values) > 1:\n            say', '        if False:\n            say', SWEEPS),
    ('the edge of the grid is not said', 'train.py', 'in (min(values), max(values))', 'in ()', SWEEPS),
    ('gamma decays', 'train.py', "name in ('head.bias', 'gamma')", "name == 'head.bias'", LOOP),
    ("the head's bias decays", 'train.py', "name in ('head.bias', 'gamma')", "name == 'gamma'", LOOP),
    ('biases decay with AdamW', 'train.py', " or config.optimizer == 'AdamW' and name.endswith('bias')", '', LOOP),
    ('a run that learned nothing says nothing', 'train.py', 'if loss > guess', 'if False', LOOP),
    ('--again deletes the old run at once', 'train.py', 'place = folder / AGAIN if again and folder.exists() else folder', 'place = folder; again and start_over(folder)', LOOP),
    ('--again never goes on', 'train.py', "if folder.name == AGAIN and differences(newest['config'], vars(config))", 'if folder.name == AGAIN', LOOP),
    ('seeds are octal', 'train.py', '            return kind(text)', '            return yaml.safe_load(text)', LOOP),
    ('lost parameters are lost', 'train.py', "if digest(params) == result['params_digest']", 'if False', LOOK),
    # number formats, devices, processes
    ('the nano ViT in bfloat16 too', 'train.py', 'wide = D >= WIDE_ENOUGH', 'wide = True', PROCESSES),
    ('emulated bfloat16 counts', 'train.py', 'including_emulation=False', 'including_emulation=True', PROCESSES),
    ('a T4 in float32', 'train.py', '((7, 0), (7, 5))', '((7, 0),)', PROCESSES),
    ('the scaler is not kept', 'train.py', "scaler.load_state_dict(newest['scaler'])", 'pass', PROCESSES),
    ('the loss is not scaled', 'train.py', 'scaler.scale(loss).backward()', 'loss.backward()', PROCESSES),
    ('every process trains on the whole batch', 'train.py', 'slice(rank, None, world))', 'slice(None))', PROCESSES),
    ('a part counts as a whole batch', 'train.py', '* (share * world)', '* 1', PROCESSES),
    ('after a restart the counter goes on', 'train.py', "os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')", "'0'", PROCESSES),
    ('each process does all runs', 'train.py', "store.add('turn', 1) - 1 for _ in count()", "i for i in count()", PROCESSES),
]


def survives(mutant):
    """Whether no test notices a mutant."""
    name, file, right, wrong, hint = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'project'
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns('.git', 'runs', 'data', '__pycache__', '.hypothesis'))
        text = (copy / file).read_text()
        for old, new in right if wrong is None else [(right, wrong)]:
            if text.count(old) < 1:
                raise SystemExit(f'mutant {name!r}: {file} has no {old!r}: bring the list up to date')
            text = text.replace(old, new)
        (copy / file).write_text(text)
        for tests in ([f'tests/{hint}.py'], ['tests']):
            command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *tests]
            if subprocess.run(command, cwd=copy, capture_output=True, timeout=1800).returncode == 1:
                return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='a part of the names of the mutants to try')
    parser.add_argument('--jobs', type=int, default=2)
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant[0]]
    with ThreadPoolExecutor(args.jobs) as pool:
        survivors = []
        for mutant, alive in zip(chosen, pool.map(survives, chosen)):
            print(f'{"SURVIVED" if alive else "killed  "}  {mutant[0]}', flush=True)
            survivors += [mutant[0]] if alive else []
    print(f'{len(chosen) - len(survivors)} of {len(chosen)} mutants killed')
    for name in survivors:
        print(f'survivor: {name}')
    return 1 if survivors else 0


if __name__ == '__main__':
    sys.exit(main())
