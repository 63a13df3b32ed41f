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
SWIN = 'test_4_3_swin'

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
    ('P starts within a bound of p and not p²', 'ivpt.py', '3 * self.vit.patch_size ** 2 + D)', '3 * self.vit.patch_size + D)', CDC),
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
    ('look: the first tokens are taken for the prompts', 'ivpt.py', '[..., -P[0].shape[-2]:, :]', '[..., :P[0].shape[-2], :]', LOOK),
    ('look: Ω of top-k where all tokens are reinforced', 'ivpt.py', "reinforcement', '') == 'topk'", "reinforcement', 'none') != 'none'", SWIN),
    ('AR at all tokens, in the wrong order', 'ivpt.py', 'torch.arange(w.shape[-1], device=w.device)', 'torch.arange(w.shape[-1], device=w.device).flip(0)', STRUCT),
    ('BitFit without the head', 'train.py', "name.endswith('.bias') or name.startswith('head.')", "name.endswith('.bias')", STRUCT),
    ('CDC of the image', 'ivpt.py', 'layer(tokens, P_hat[l], ', 'layer(tokens, P_hat[l] + tokens[:, :1].detach(), ', CDC),
    ('the last layer does not see inherited prompts', 'ivpt.py', 'layer(tokens[:, :1], tokens[:, 1:])', 'layer(tokens[:, :1], tokens[:, 1:1 + self.M])', STRUCT),
    ('AR "All" from the last position to the first', 'ivpt.py', 'torch.arange(w.shape[-1], device=w.device)', 'torch.arange(w.shape[-1], device=w.device).flip(0)', STRUCT),
    ('AR "All" with k rows', 'ivpt.py', "vit.M if reinforcement == 'all' else k", "min(k, vit.M)", STRUCT),
    ('AR with inherited prompts is ignored', 'ivpt.py', "if reinforcement != 'none' and structure in INHERITED", 'if False', STRUCT),
    ('bias tuning trains no LayerNorm', 'train.py', "name.endswith('.bias') or", "name.endswith('.bias') and 'norm' not in name or", STRUCT),
    ('bias tuning trains no head', 'train.py', "name.endswith('.bias') or name.startswith('head.')", "name.endswith('.bias')", STRUCT),
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
    # Swin
    ("Swin: LayerNorm with the ViT's ε", 'vit.py', 'eps=1e-5', 'eps=1e-6', SWIN),
    ('Swin: no shift', 'vit.py', 'w // 2 if l % 2 and H > w else 0', '0', SWIN),
    ('Swin: even layers are shifted', 'vit.py', 'if l % 2 and', 'if not l % 2 and', SWIN),
    ('Swin: one window that is the grid is shifted', 'vit.py', 'l % 2 and H > w else', 'l % 2 else', SWIN),
    ('Swin: rolled the other way', 'vit.py', 'roll((-s, -s), (0, 1))', 'roll((s, s), (0, 1))', SWIN),
    ('Swin: no mask', 'vit.py', 'mask = -100.0 *', 'mask = -0.0 *', SWIN),
    ('Swin: columns from the other end are not masked', 'vit.py', '2 * (order // H < s) + (order % H < s)', '2 * (order // H < s)', SWIN),
    ('Swin: tokens that are rolled by both axes see those of one', 'vit.py', '2 * (order // H < s) +', '1 * (order // H < s) +', SWIN),
    ('Swin: bias of key and query the wrong way round', 'vit.py', 'at.unsqueeze(1) - at + w', 'at - at.unsqueeze(1) + w', SWIN),
    ('Swin: rows and columns of the bias exchanged', 'vit.py', 'dy * (2 * w - 1) + dx', 'dx * (2 * w - 1) + dy', SWIN),
    ('Swin: no relative position bias', 'vit.py', 'self.relative_position_bias_table[self.index]', '0 * self.relative_position_bias_table[self.index]', SWIN),
    ('Swin: windows that are read column by column', 'vit.py', '.transpose(1, 2).reshape(-1, w * w)', '.permute(0, 2, 3, 1).reshape(-1, w * w)', SWIN),
    ('Swin: tokens do not go back to their places', 'vit.py', 'back, w = self.order.flatten().argsort(), None', 'back, w = self.order.flatten(), None', SWIN),
    ('Swin: 2 x 2 tokens are merged row by row', 'vit.py', 'permute(0, 1, 3, 4, 2, 5)', 'permute(0, 1, 3, 2, 4, 5)', SWIN),
    ('Swin: merging without its norm', 'vit.py', 'self.reduction(self.norm(x', 'self.reduction((x', SWIN),
    ('Swin: the first token is classified', 'vit.py', 'self.norm(tokens).mean(dim=1)', 'self.norm(tokens)[:, 0]', SWIN),
    ('Swin: the mean is normalised, not the tokens', 'vit.py', 'self.norm(tokens).mean(dim=1)', 'self.norm(tokens.mean(dim=1))', SWIN),
    ('Swin: iVPT classifies the first token', 'ivpt.py', 'self.vit.norm(tokens).mean(dim=1)', 'self.vit.norm(tokens)[:, 0]', SWIN),
    ('Swin: heads do not double', 'vit.py', '2 * D, 2 * N_h, H // 2', '2 * D, N_h, H // 2', SWIN),
    ('Swin: prompts have a bias', 'vit.py', 'bias = F.pad(bias, (0, len(c)))', 'bias = F.pad(bias, (0, len(c)), value=0.1)', SWIN),
    ('Swin: the first window alone has prompts', 'vit.py', 'p.repeat(n_W, 1, 1)', 'torch.cat([p, 0 * p.repeat(n_W - 1, 1, 1)])', SWIN),
    ('Swin: heads of prompts go to the wrong windows', 'vit.py', 'p.repeat(n_W, 1, 1)', 'p.repeat_interleave(n_W, 0)', SWIN),
    ('Swin: attention that a token pays, not that it receives', 'vit.py', 'w = A.mean(dim=2)', 'w = A.mean(dim=3)', SWIN),
    ('Swin: the softmax of attention received is without prompts', 'vit.py', '** 0.5 + bias).softmax(-1)', '** 0.5 + bias)[..., :T].softmax(-1)', SWIN),
    ('Swin: attention received of one head', 'vit.py', '.mean(dim=2)[..., :T]', '[:, :, 0, :T]', SWIN),
    ('Swin: attention received from the first query', 'vit.py', 'w = A.mean(dim=2)', 'w = A[:, :, 0]', SWIN),
    ('Swin: attention received without bias and mask', 'vit.py', '/ q.shape[-1] ** 0.5 + bias)', '/ q.shape[-1] ** 0.5 + 0 * bias)', SWIN),
    ('Swin: attention received is not rolled back', 'vit.py', '[..., :T].flatten(1)[:, back]', '[..., :T].flatten(1)', SWIN),
    ('Swin: attention received carries a gradient', 'vit.py', 'with torch.no_grad():  # beside', 'with torch.enable_grad():  # beside', SWIN),
    ('Swin: attention weights that nobody reads', 'ivpt.py', 'need_weights=l < len(P_re)', 'need_weights=True', SWIN),
    ('Swin: AR after the last layer', 'ivpt.py', 'L - (i + 1 == len(sizes))', 'L', SWIN),
    ("Swin: no AR at a stage's end", 'ivpt.py', 'L - (i + 1 == len(sizes))', 'L - 1', SWIN),
    ('Swin: k is not capped', 'ivpt.py', 'min(k, M), D', 'k, D', SWIN),
    ('Swin: CDC without DA in each stage', 'ivpt.py', 'self.connect(P, gamma) for', 'self.connect(P) for', SWIN),
    ("Swin: prompts start with each stage's own bound", 'ivpt.py', 'torch.empty(L, N, D).uniform_(-bound, bound)',
     'torch.empty(L, N, D).uniform_(-1, 1) * (6 / (48 + D)) ** 0.5', SWIN),
    ('Swin: inherited prompts are taken', 'ivpt.py', "        if self.structure in INHERITED:\n            raise InputError(f'{self.",
     "        if False:\n            raise InputError(f'{self.", SWIN),
    ('Swin: AR chooses the last stage\'s last tokens too', 'ivpt.py', '(*w[:-1], w[-1][:, :-1])', 'w', SWIN),
    ("Swin: merging at a stage's end is not moved", 'vit.py', 'int(stage[1]) + 1', 'int(stage[1])', SWIN),
    ('Swin: buffers of a file are not dropped', 'vit.py', "if not name.endswith(('.relative_position_index', '.attn_mask'))", 'if True', SWIN),
    ("Swin: the authors' head is not fc", 'vit.py', "'head.fc.', name)", "'head.', name)", SWIN),
    ("Swin: a file's head is not left out", 'vit.py', r'head\.(fc\.)?(weight|bias)', r'head\.(weight|bias)', SWIN),
    ('Swin: an image may be cut off', 'vit.py', 'img_size < 1 or img_size % unit', 'img_size < 1', SWIN),
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
