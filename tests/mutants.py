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
FORMATS, SWEEPS = 'test_4_data_formats', 'test_4_sweeps'
TABLE_1, TEST_1 = 'tests/table_1.py', 'test_4_2_table_1'

# (the mistake, the file, the text that is right, the text that is wrong, the test file that should notice)
MUTANTS = [
    # 3.1, the layer
    ('the keys and values of prompts skip LayerNorm', 'vit.py', '*(self.norm1(c) for c in context)', '*context', VPT),
    ('keys and values of prompts are swapped', 'vit.py', 'zip(*pairs)', 'list(zip(*pairs))[::-1]', VPT),
    ('prompts have no bias in their keys and values', 'vit.py', 'F.linear(c, W_KV, b_KV)', 'F.linear(c, W_KV, 0 * b_KV)', VPT),
    ('sqrt(D) for sqrt(D / N_h) in attention', 'vit.py', 'attention(q, k, v)', 'attention(q, k, v, scale=D ** -0.5)', VPT),
    ('sqrt(D) for sqrt(D / N_h) in the row of weights', 'vit.py', '/ q.shape[-1] ** 0.5).softmax', '/ self.proj.in_features ** 0.5).softmax', VPT),
    ('the row of weights is that of one head', 'vit.py', 'w.mean(dim=1).squeeze(1)', 'w[:, 0].squeeze(1)', VPT),
    ('the row of weights is the maximum over heads', 'vit.py', 'w.mean(dim=1).squeeze(1)', 'w.amax(dim=1).squeeze(1)', VPT),
    ('the row of weights is from before the softmax', 'vit.py', '** 0.5).softmax(-1)', '** 0.5)', VPT),
    ('the row of weights is that of the last token', 'vit.py', 'q[:, :, :1]', 'q[:, :, -1:]', VPT),
    ('the row of weights carries a gradient', 'vit.py', 'with torch.no_grad():  # one', 'with torch.enable_grad():  # one', VPT),
    # the last layer's one query
    ('the one query is not divided by sqrt(d)', 'vit.py', "W_K, q) / q.shape[-1] ** 0.5", "W_K, q)", VPT),
    ('the one query has no bias', 'vit.py', 'token[:, 0]) + b_Q', 'token[:, 0]) + 0 * b_Q', VPT),
    ('the values that the one query gathers have no bias', 'vit.py', 'W_V, wx) + b_V', 'W_V, wx) + 0 * b_V', VPT),
    ('the one query reads keys for values', 'vit.py', "einsum('hde,bhe->bhd', W_V, wx)", "einsum('hde,bhe->bhd', W_K, wx)", VPT),
    ('each context has a softmax of its own', 'vit.py', 'torch.cat([W_Kq @ y.mT for y in x], dim=-1).softmax(-1)',
     'torch.cat([(W_Kq @ y.mT).softmax(-1) for y in x], dim=-1)', VPT),
    ('the one query does not see its own token', 'vit.py', 'x = token, *context', 'x = 0 * token, *context', VPT),
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
    ('the last layer without prompts', 'ivpt.py', '(z_cls, Z, P_hat[-1])', '(z_cls, Z)', CDC),
    ('the last layer without image tokens', 'ivpt.py', '(z_cls, Z, P_hat[-1])', '(z_cls, P_hat[-1])', CDC),
    ('the head reads what the last LayerNorm has not seen', 'ivpt.py', 'self.head(self.vit.norm(z_cls.squeeze(1)))', 'self.head(z_cls.squeeze(1))', CDC),
    ('the backbone is left trainable', 'ivpt.py', 'vit.requires_grad_(False)', 'vit', LOOP),
    ('the backbone leaves eval mode', 'ivpt.py', '        self.vit.eval()\n', '', VPT),
    ('no prompts are allowed', 'ivpt.py', 'N < 1 or', 'N < 0 or', INPUT),
    ('more reinforcing prompts than image tokens are allowed', 'ivpt.py', '1 <= k <= vit.M', '1 <= k <= 10 * vit.M', INPUT),
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
    ('the last layer does not see inherited prompts', 'ivpt.py', 'layer(tokens[:, :1], tokens[:, 1:])', 'layer(tokens[:, :1], tokens[:, 1:1 + self.M])', STRUCT),
    ('AR "All" from the last position to the first', 'ivpt.py', 'torch.arange(w.shape[-1], device=w.device)', 'torch.arange(w.shape[-1], device=w.device).flip(0)', STRUCT),
    ('AR "All" with k rows', 'ivpt.py', "k = vit.M if reinforcement == 'all' else k", "k = min(k, vit.M)", STRUCT),
    ('AR with inherited prompts is ignored', 'ivpt.py', "if reinforcement != 'none' and structure in INHERITED", 'if False', STRUCT),
    ('bias tuning trains no LayerNorm', 'train.py', "name.endswith('.bias') or", "name.endswith('.bias') and 'norm' not in name or", STRUCT),
    ('bias tuning trains no head', 'train.py', "name.endswith('.bias') or name.startswith('head.')", "name.endswith('.bias')", STRUCT),
    # 4.2, Table 1's systems
    ('Table 1: what is beside a part is after it', TABLE_1, 'y + part.side(*inputs)', 'y + part.side(y)', TEST_1),
    ('Table 1: SNF on one shortcut', TABLE_1, 'self.shortcut1(x) + keep1', 'x + keep1', TEST_1),
    ('Table 1: SCT on the shortcut alone', TABLE_1, 'x = self.between(self.shortcut1(x) + keep1 * y)\n        return self.shortcut2(x)',
     'x = self.shortcut1(x) + keep1 * y\n        return self.shortcut2(self.between(x))', TEST_1),
    ('Table 1: SCT after the MLP', TABLE_1, 'return self.shortcut2(x) + keep2 * self.mlp(self.norm2(x)), w',
     'return self.between(self.shortcut2(x) + keep2 * self.mlp(self.norm2(x))), w', TEST_1),
    ('Table 1: prompts skip LayerNorm', TABLE_1, '[self.norm1(self.prompts(x))]', '[self.prompts(x)]', TEST_1),
    ('Table 1: stochastic depth of whole layers', TABLE_1, 'keep1, keep2 = F.dropout(x.new_ones(2, len(x), 1, 1)',
     'keep1 = keep2 = F.dropout(x.new_ones(len(x), 1, 1)', TEST_1),
    ('Table 1: stochastic depth of tokens', TABLE_1, 'x.new_ones(2, len(x), 1, 1)', 'x.new_ones(2, len(x), x.shape[1], 1)', TEST_1),
    ('Table 1: stochastic depth is the same in all layers', TABLE_1, 's.drop_path * l / max(1, vit.L - 1)', 's.drop_path', TEST_1),
    ('Table 1: stochastic depth when it is tested', TABLE_1, 'self.drop_path, self.training)', 'self.drop_path)', TEST_1),
    ('Table 1: the class token is read for every backbone', TABLE_1, 'self.head(self.vit.read(x))', 'self.head(self.vit.norm(x[:, 0]))', TEST_1),
    ('Table 1: the ViT is trained too', TABLE_1, 'vit.requires_grad_(False), s', 'vit, s', TEST_1),
    ('Adapter with ReLU', TABLE_1, 'F.gelu(', 'F.relu(', TEST_1),
    ('Adapter after its shortcut', TABLE_1, 'y + F.linear(F.gelu(F.linear(y, p.W', 'y + F.linear(F.gelu(F.linear(2 * y, p.W', TEST_1),
    ("Adapter as VPT's, dead", TABLE_1, '0 if s.zeros else D ** -0.5', '0', TEST_1),
    ("VPT's Adapter, alive", TABLE_1, '0 if s.zeros else D ** -0.5', 'D ** -0.5', TEST_1),
    ('AdaptFormer without its scale', TABLE_1, 's.scale * F.linear(h, p.U, p.e)', 'F.linear(h, p.U, p.e)', TEST_1),
    ('AdaptFormer around MSA', TABLE_1, 'layer.shortcut2 = Side(f, W=uniform(D ** -0.5, s.r, D), c=', 'layer.shortcut1 = Side(f, W=uniform(D ** -0.5, s.r, D), c=', TEST_1),
    ('Bi-Adapter: no gradient through the signs', TABLE_1, '((0.6744897502 * w.sign() - w).detach() + w)', '(0.6744897502 * w.sign())', TEST_1),
    ('Bi-Adapter: no gradient through mean and deviation', TABLE_1, 'm, sigma = W.mean(), W.std()', 'm, sigma = W.mean().detach(), W.std().detach()', TEST_1),
    ('Bi-Adapter: the deviation of all there is', TABLE_1, 'W.std()', 'W.std(correction=0)', TEST_1),
    ('Bi-Adapter: mean 0', TABLE_1, 'm, sigma = W.mean(), W.std()', 'm, sigma = 0, W.std()', TEST_1),
    ('LoRA does not start as the ViT', TABLE_1, 'B=torch.zeros(3 * D, s.r)', 'B=torch.ones(3 * D, s.r)', TEST_1),
    ('LoRA without its scale', TABLE_1, 's.scale * (F.dropout(x, s.dropout, p.training) @ p.A.T @ p.B.T)', '10 * (F.dropout(x, s.dropout, p.training) @ p.A.T @ p.B.T)', TEST_1),
    ('LoRA with dropout when it is tested', TABLE_1, 'F.dropout(x, s.dropout, p.training) @ p.A.T', 'F.dropout(x, s.dropout) @ p.A.T', TEST_1),
    ("FacT: proj and fc1 share slices", TABLE_1, '(layer.mlp.fc1, 4, 4)', '(layer.mlp.fc1, 3, 4)', TEST_1),
    ('FacT: all layers share slices', TABLE_1, 'range(12 * l + j, 12 * l + j + n)', 'range(j, j + n)', TEST_1),
    ("FacT: fc2's slices are not transposed", TABLE_1, 'sum(z @ T_j.T for', 'sum(z @ T_j for', TEST_1),
    ('FacT: each part has factors of its own', TABLE_1, 'x if isinstance(x, nn.Parameter) else nn.Parameter(x)', 'nn.Parameter(x.data.clone())', TEST_1),
    ('FacT does not start as the ViT', TABLE_1, 'nn.Parameter(torch.zeros(D, r))', 'nn.Parameter(torch.ones(D, r))', TEST_1),
    ('SSF not after the patch embedding', TABLE_1, '[vit.patch_embed, *(part for', '[*(part for', TEST_1),
    ('SSF not after LayerNorm', TABLE_1, '*(part for part in vit.modules() if isinstance(part, (nn.Linear, nn.LayerNorm)))]', '*(part for part in vit.modules() if isinstance(part, nn.Linear))]', TEST_1),
    ('SSF starts as the ViT', TABLE_1, '1 + 0.02 * torch.randn(D), 0.02 * torch.randn(D)', 'torch.ones(D), torch.zeros(D)', TEST_1),
    ('SNF: λ and not its exponential', TABLE_1, 'p.lam.exp() * x', 'p.lam * x', TEST_1),
    ('SNF: every planar flow sees x', TABLE_1, 'torch.tanh(z @ w + c)', 'torch.tanh(x @ w + c)', TEST_1),
    ('SNF: the branches see the flow', TABLE_1, 'y, w = self.attn(self.norm1(x), *context', 'y, w = self.attn(self.norm1(self.shortcut1(x)), *context', TEST_1),
    ('SCT: sums of squares and not norms', TABLE_1, 'square[square.any(dim=1)].sqrt().mean(dim=0)', 'square[square.any(dim=1)].mean(dim=0)', TEST_1),
    ('SCT: classes that are not there count', TABLE_1, 'square[square.any(dim=1)].sqrt().mean(dim=0)', 'square.sum(dim=0)', TEST_1),
    ('SCT: the class token counts', TABLE_1, 'x[:, 1:].double()', 'x.double()', TEST_1),
    ('SCT: what leaves the layer counts', TABLE_1, "                square.index_add_(0, labels, x[:, 1:].double().pow(2).sum(dim=1))\n                x = x + layer.mlp(layer.norm2(x))\n",
     "                x = x + layer.mlp(layer.norm2(x))\n                square.index_add_(0, labels, x[:, 1:].double().pow(2).sum(dim=1))\n", TEST_1),
    ('SCT: the last batch alone counts', TABLE_1, 'square.index_add_(0, labels', 'square.zero_().index_add_(0, labels', TEST_1),
    ('SCT runs without its channels', TABLE_1, 'torch.full([K], -1)', 'torch.arange(K)', TEST_1),
    ('SPT: the gradient is not squared', TABLE_1, 'dim=1) ** 2', 'dim=1).abs()', TEST_1),
    ('SPT: gradients of all batches are one', TABLE_1, 'range(16)', 'range(99)', TEST_1),
    ('SPT: a matrix is an eighth of its cost', TABLE_1, 'cost / self.s.alpha', 'cost / 8', TEST_1),
    ('SPT: a vector is whole by a tenth', TABLE_1, 'len(vector) / self.s.beta', 'len(vector) / 10', TEST_1),
    ('SPT: single numbers stay beside B A', TABLE_1, '                rows[:, :-1] = False\n', '', TEST_1),
    ('SPT: queries, keys and values are one matrix', TABLE_1, 'self.n = 3 if self.o == 3 * self.i else 1', 'self.n = 1', TEST_1),
    ('SPT: B A in the wrong part', TABLE_1, 'index_add(-2, self.parts, BAx)', 'index_add(-2, self.n - 1 - self.parts, BAx)', TEST_1),
    ('SPT: the class token is not trained', TABLE_1, '    vit.cls_token.requires_grad_()\n', '', TEST_1),
    ('SPT: the class token is not in the budget', TABLE_1, 'budget - self.vit.D', 'budget', TEST_1),
    ('SPT: gains of LayerNorm for biases', TABLE_1, 'F.layer_norm(x, b.shape, W[:, 0], b, eps=1e-6)', 'F.layer_norm(x, b.shape, b, W[:, 0], eps=1e-6)', TEST_1),
    ('SPT: the least sensitive numbers', TABLE_1, 'argsort(descending=True, stable=True)', 'argsort(stable=True)', TEST_1),
    ('SPT: loading forgets what the pictures chose', TABLE_1, 'if parts.shape != self.parts.shape or at.shape != self.at.shape:', 'if False:', TEST_1),
    ('SPT: loading replaces what an optimizer holds', TABLE_1, 'if parts.shape != self.parts.shape or at.shape != self.at.shape:', 'if True:', TEST_1),
    ('SPT: the ViT keeps its gradients', TABLE_1, 'self.vit.requires_grad_(False).cls_token', 'self.vit.cls_token', TEST_1),
    ('E2VPT: keys without values', TABLE_1, '[0 * p.E, p.E, p.E]', '[0 * p.E, p.E, 0 * p.E]', TEST_1),
    ('E2VPT: the first tokens are cut off', TABLE_1, 'y[:, :-s.N_kv]', 'y[:, s.N_kv:]', TEST_1),
    ('E2VPT without its prompts', TABLE_1, 'context = [self.norm1(self.prompts(x))] if self.prompts else []', 'context = []', TEST_1),
    ('GaPT: gates the other way round', TABLE_1, 'g * y[:, M:] + (1 - g) * P', '(1 - g) * y[:, M:] + g * P', TEST_1),
    ('GaPT: keys divided as well', TABLE_1, 'qkv[..., :vit.D] / p.tau, qkv[..., vit.D:]', 'qkv[..., :2 * vit.D] / p.tau, qkv[..., 2 * vit.D:]', TEST_1),
    ('GaPT: temperatures without limits', TABLE_1, '        p.tau.data.clamp_(0.01, 10)', '        pass', TEST_1),
    ('GaPT: a temperature beyond its limits has no gradient', TABLE_1, '        p.tau.data.clamp_(0.01, 10)  #', '        p = Side(None, tau=nn.Parameter(torch.ones([]))) if p.tau > 10 else p  #', TEST_1),
    # 4.1, the loop
    ('warm-up is off by one', 'train.py', 'return (step + 1) / rising', 'return step / rising', LOOP),
    ('warm-up is one step too long', 'train.py', 'if step < rising', 'if step <= rising', LOOP),
    ('the cosine stops half-way', 'train.py', 'math.cos(math.pi * (', 'math.cos(math.pi / 2 * (', LOOP),
    ('the cosine starts at step 0', 'train.py', '(step - rising) / (steps - rising)', 'step / steps', LOOP),
    ('gradients add up over steps', 'train.py', '            optimizer.zero_grad()\n', '', LOOP),
    ('SGD without momentum', 'train.py', 'config.lr, config.momentum, weight', 'config.lr, weight', LOOP),
    ('SGD without weight decay', 'train.py', 'momentum, weight_decay=config.weight_decay', 'momentum', LOOP),
    ('the learning rate does not follow the schedule', 'train.py', "group['lr'] = lr\n", "group['lr'] = config.lr\n", LOOP),
    ('labels are smoothed', 'train.py', 'F.cross_entropy(model(images), labels)', 'F.cross_entropy(model(images), labels, label_smoothing=0.1)', LOOP),
    ('a loss that is not a number goes on', 'train.py', 'if not math.isfinite(value)', 'if False', INPUT),
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
    ("classes of a folder's test are counted in test", 'data.py', '(file, classes.index(found.classes[label]))', '(file, label)', FORMATS),
    ("a folder's val is trained on before the final run", 'data.py', 'train[:len(train) // 5], train[len(train) // 5:]', 'train[:len(train) // 5], train', FORMATS),
    ('a circle of links multiplies the images', 'data.py', 'if len({os.path.realpath(file)', 'if False and len({os.path.realpath(file)', FORMATS),
    ('a link to a folder of images is refused', 'data.py', "Path(name).is_absolute() or", 'not (folder / name).resolve().is_relative_to(folder.resolve()) or', FORMATS),
    ('an error does not say which image of an array it was', 'data.py', ', image {self.index}', '', FORMATS),
    ('only the first of two sets is checked', 'data.py', 'in pictures.datasets if', 'in pictures.datasets[:1] if', FORMATS),
    ('every run checks every image again', 'data.py', 'DECODED.update(path for path, _ in new)', 'pass', FORMATS),
    ('KITTI is cropped and flipped', 'configs.yaml', 'n_test: 711, N: 50, k: 10, augment: none', 'n_test: 711, N: 50, k: 10', FORMATS),
    # what tells pictures from others
    ('a digest does not see the order of pictures', 'data.py', 'lines = [repr(value) for value in values]', 'lines = sorted(map(repr, values))', DATA),
    ('a digest holds where the data folder is', 'data.py', 'os.path.relpath(picture, folder), ', 'str(picture), ', DATA),
    ('a digest does not see the size of a file', 'data.py', 'os.path.getsize(picture)', '0', DATA),
    ('a digest does not see pictures in memory', 'data.py', 'return hashlib.sha256(picture.cpu().contiguous().numpy()).hexdigest()', "return 'picture'", DATA),
    # many runs
    ('a search scores on the test images', 'train.py', "{'score_on': 'val', 'point': f'search", "{'score_on': 'test', 'point': f'search", SWEEPS),
    ('of equal points the larger learning rate wins', 'train.py', "-row[0].get('lr', 0))", "row[0].get('lr', 0))", SWEEPS),
    ('a search takes the worst point', 'train.py', "row[0].get('lr', 0)), reverse=True)", "row[0].get('lr', 0)))", SWEEPS),
    ('a GPU without memory ends in a traceback', 'train.py', '        except (InputError, torch.cuda.OutOfMemoryError) as', '        except InputError as', INPUT),
    ('a report takes all seeds', 'train.py', "glob(f'seed{seed}/result.json')", "glob('seed*/result.json')", SWEEPS),
    ('pictures in memory stay on the CPU', 'data.py', 'image.to(device, copy=True)', 'image.clone()', DATA),
    ('a point that diverges ends the search', 'train.py', 'except Diverged as error:', 'except ZeroDivisionError as error:', SWEEPS),
    ('every seed searches for itself', 'train.py', 'key = config.task, config.method  #', 'key = config.task, config.method, config.seed  #', SWEEPS),
    ('what the search found is not used', 'train.py', 'config = SimpleNamespace(**vars(config) | best[key])', 'pass', SWEEPS),
    ('the mean of groups is the mean of tasks', 'train.py', "for member in configs['groups'][name]]",
     "for member in tasks_of(configs, [name])]", SWEEPS),
    ('a missing task is left out of its mean', 'train.py', "members = [value(member, method, seed) for member in configs['groups'][name]]",
     "members = [x for m in configs['groups'][name] if (x := value(m, method, seed)) is not None]", SWEEPS),
    ('validation accuracies are reported', 'train.py', " and result['score_on'] == 'test':", ':', SWEEPS),
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
    ('a run: the result is written before the parameters', 'train.py', "    write(folder / 'params.pth', params.getvalue())\n"
     '    write_result(folder, result)\n', "    write_result(folder, result)\n    write(folder / 'params.pth', params.getvalue())\n", STOPS),
    ('a run: a run goes on with other settings', 'train.py', 'if changed := differences(old, vars(config))', 'if False', STOPS),
    ('a run: a finished run is run again', 'train.py', 'if not again and (result', 'if False and (result', STOPS),
    ('a run: the log has the last epoch alone', 'train.py', 'for record in records).encode()', 'for record in records[-1:]).encode()', STOPS),
    ('a run: the log is not written again after an interruption', 'train.py', "write_log(folder, newest['records'])", 'pass', STOPS),
    ('a run: SIGTERM has the status of Ctrl-C', 'train.py', 'stop.status = 128 + number', 'stop.status = 130', STOPS),
    ('a run: what is set aside is deleted', 'train.py', 'path.replace(aside)', 'path.unlink()', STOPS),
    ('a run: a mistake is said once a run', 'train.py', 'if str(error) not in said', 'if True', STOPS),
    ('a run: a name in configs.yaml may be a path', 'train.py', 'if not all(re.fullmatch(', 'if False and all(re.fullmatch(', FUZZ),
    ('a run: an alias in YAML is expanded', 'train.py', 'if self.check_event(yaml.AliasEvent)', 'if False', FUZZ),
    # Figure 7
    ('Figure 7: Ω of the layer before', 'train.py', "seen['Omega'][0, l].tolist()", "seen['Omega'][0, l - 1].tolist()", LOOK),
    ('Figure 7: the maps in the order from the last layer', 'train.py', "enumerate(seen['w'][0].float().cpu())",
     "enumerate(seen['w'][0].flip(0).float().cpu())", LOOK),
    ('Figure 7: a map over a black picture', 'train.py', 'row.append(heat_map(row[0], w', 'row.append(heat_map(0 * row[0], w', LOOK),
    ('Figure 7: every row has the maps of the first picture', 'train.py', 'seen = ivpt.look(model, image)',
     'seen = seen if i else ivpt.look(model, image)', LOOK),
    ('Figure 7: every row has the first picture', 'train.py', 'row = tiles(image, seen, config)',
     'first = first if i else image; row = tiles(first, seen, config)', LOOK),
    ('Figure 7: the picture is not de-normalised', 'train.py', 'image[0] * std + mean', 'image[0]', LOOK),
    ('Figure 7: the picture is de-normalised by the standard deviation alone', 'train.py', 'image[0] * std + mean', 'image[0] * std', LOOK),
    ('Figure 7: the class with the smallest logit is named first', 'train.py', '.topk(min(5, len(classes)))',
     '.topk(min(5, len(classes)), largest=False)', LOOK),
    ('Figure 7: the second class is named in the picture', 'train.py', '{classes[best[0]]}', '{classes[best[1]]}', LOOK),
    ('Figure 7: the truth is the class that is named', 'train.py', 'in truth {classes[label]}', 'in truth {classes[best[0]]}', LOOK),
    ('Figure 7: the images of a run stand together', 'train.py', '    rows.sort(key=lambda row: row[0])', '    # ', LOOK),
    ('Figure 7: training images are shown', 'train.py', 'test = data.load(config).test\n', 'test = data.load(config).train\n', LOOK),
    ('Figure 7: the last test images are shown', 'train.py', '[test[i] for i in range(min(4, len(test)))]', '[test[-1 - i] for i in range(4)]', LOOK),
    ('Figure 7: a photo is squeezed and not cropped', 'train.py', 'data.read_image(file, data.resized(config))',
     'data.read_image(file, 2 * (config.img_size,))', LOOK),
    ('Figure 7: a photo is augmented', 'train.py', 'next(data.batches([(image, label)], config, device))',
     'next(data.batches([(image, label)], config, device, 0))', LOOK),
    # what no test saw
    ('unseen: noise depends on the seed', 'train.py', 'torch.Generator().manual_seed(0)', 'torch.Generator().manual_seed(config.seed)', SWEEPS),
    ('unseen: noise is the same for every batch', 'train.py', 'generator=generator).to(device)',
     'generator=torch.Generator().manual_seed(0)).to(device)', SWEEPS),
    ("unseen: noisy images are prepared by the command line's settings", 'train.py', 'accuracy(model, test, stored, device, rate)',
     'accuracy(model, test, config, device, rate)', SWEEPS),
    ("unseen: noisy images are loaded by the command line's settings", 'train.py', "data.load(SimpleNamespace(**vars(stored) | {'data': config.data}))",
     'data.load(config)', SWEEPS),
    *[(f'unseen: {name} is free', 'train.py', "FREE = {'data', ", f"FREE = {{'data', '{name}', ", STOPS)
      for name in ('bf16', 'mean', 'n_test', 'score_on', 'save_dtype', 'k')],
    *[(f'unseen: {name} is not free', 'train.py', f"'{name}', ", '', STOPS) for name in ('cache_gb', 'grid', 'paper_params')],
    ('unseen: settings that only the older run has are not compared', 'train.py', '(old.keys() | new.keys())', 'new.keys()', STOPS),
    ('unseen: settings that only the new run has are not compared', 'train.py', '(old.keys() | new.keys())', 'old.keys()', STOPS),
    ('unseen: --again does not search again', 'train.py', 'search(config, again)', 'search(config)', SWEEPS),
    ('unseen: test images are not checked before training', 'train.py', 'for pictures in (learn, score)', 'for pictures in (learn,)', INPUT),
    ('unseen: an old result is deleted before the images are checked', 'train.py',
     [("    if again:\n        start_over(folder)\n", ''), ('    learn = data.in_memory(', '    if again:\n        start_over(folder)\n    learn = data.in_memory(')],
     None, INPUT),
    ("unseen: the paper's figure beside a validation accuracy", 'train.py', "config.paper_accuracy if config.score_on == 'test' else 0",
     'config.paper_accuracy', LOOP),
    ('unseen: Ctrl-C keeps a part of an epoch', 'train.py', "        where = f'in epoch {len(records) + 1}",
     "        save(folder, model, optimizer, records, config, device)\n        where = f'in epoch {len(records) + 1}", STOPS),
    ('unseen: two processes write into the same file', 'train.py', '.{os.getpid()}.{time.monotonic_ns()}.part', '.part', STOPS),
    ('unseen: SIGTERM is not handled', 'train.py', '    signal.signal(signal.SIGTERM, terminate)\n', '', STOPS),
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
