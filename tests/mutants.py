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
LOOP, DATA, COUNTS, FILES, INPUT, STOPS, FUZZ = (
    'test_4_1_training', 'test_4_1_data', 'test_4_accounting', 'test_weights', 'test_bad_input', 'test_4_1_interruptions',
    'test_bad_input_fuzz')

# (the mistake, the file, the text that is right, the text that is wrong, the test file that should notice)
MUTANTS = [
    # 3.1, the layer
    ('the keys and values of prompts skip LayerNorm', 'vit.py', '*(self.norm1(c) for c in context)', '*context', VPT),
    ('keys and values of prompts are swapped', 'vit.py', 'zip(*pairs)', 'list(zip(*pairs))[::-1]', VPT),
    ('prompts have no bias in their keys and values', 'vit.py', 'F.linear(c, W_KV, b_KV)', 'F.linear(c, W_KV, 0 * b_KV)', VPT),
    ('sqrt(D) for sqrt(D / N_h) in attention', 'vit.py', 'attention(q, k, v)', 'attention(q, k, v, scale=D ** -0.5)', VPT),
    ('sqrt(D) for sqrt(D / N_h) in the row of weights', 'vit.py', '/ q.shape[-1] ** 0.5).softmax', '/ D ** 0.5).softmax', VPT),
    ('the row of weights is that of one head', 'vit.py', 'w.mean(dim=1).squeeze(1)', 'w[:, 0].squeeze(1)', VPT),
    ('the row of weights is the maximum over heads', 'vit.py', 'w.mean(dim=1).squeeze(1)', 'w.amax(dim=1).squeeze(1)', VPT),
    ('the row of weights is from before the softmax', 'vit.py', '** 0.5).softmax(-1)', '** 0.5)', VPT),
    ('the row of weights is that of the last token', 'vit.py', 'q[:, :, :1]', 'q[:, :, -1:]', VPT),
    ('the row of weights carries a gradient', 'vit.py', 'with torch.no_grad():  # one', 'with torch.enable_grad():  # one', VPT),
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
    ('Eq. 7 with sqrt(D)', 'ivpt.py', '/ q.shape[-1] ** 0.5)', '/ p.shape[-1] ** 0.5)', ALPHA),
    ('Eq. 7 without its scale', 'ivpt.py', ' / q.shape[-1] ** 0.5)', ')', ALPHA),
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
    ('Eq. 15 puts P_re in the place of Z', 'ivpt.py', 'Z.scatter_add(', 'Z.scatter(', AR),
    ('Eq. 15 subtracts', 'ivpt.py', 'P_re.expand(B, k, D)', '-P_re.expand(B, k, D)', AR),
    ('Eq. 15 adds the first row of P_re everywhere', 'ivpt.py', 'P_re.expand(B, k, D)', 'P_re[:1].expand(B, k, D)', AR),
    ("the class token's offset is forgotten", 'ivpt.py', 'reinforce(tokens, 1 + Omega', 'reinforce(tokens, Omega', AR),
    ('the class token competes for saliency', 'ivpt.py', 'w[:, 1:1 + self.M]', 'w[:, :self.M]', AR),
    ('prompts compete for saliency', 'ivpt.py', 'w[:, 1:1 + self.M]', 'w[:, -self.M:]', AR),
    ('P_re of another layer', 'ivpt.py', 'self.P_re[l])', 'self.P_re[l - 1])', AR),
    ('P_re of the first layer in all', 'ivpt.py', 'self.P_re[l])', 'self.P_re[0])', AR),
    ('AR with saliency that is one layer old', 'ivpt.py', 'tokens, w = layer(tokens, P_hat[l])  # Eq. 3, w [B, 1 + M + N]',
     'w_old = w if l else None; tokens, w = layer(tokens, P_hat[l]); w, w_new = (w if w_old is None else w_old), w', AR),
    ('AR after every layer, the last one included', 'ivpt.py', 'torch.zeros(L - 1, k, D)', 'torch.zeros(L, k, D)', AR),
    ('P_re does not start at 0', 'ivpt.py', 'torch.zeros(L - 1, k, D)', 'torch.randn(L - 1, k, D)', AR),
    ('AR reinforces before the layer', 'ivpt.py', 'tokens, w = layer(tokens, P_hat[l])',
     '_, w = layer(tokens, P_hat[l]); before = tokens; tokens, _ = layer(before if self.P_re is None else reinforce(before, '
     '1 + top_k(w[:, 1:1 + self.M], self.k), self.P_re[l]), P_hat[l])', AR),
    # the model
    ('the prompts of another layer', 'ivpt.py', 'layer(tokens, P_hat[l])', 'layer(tokens, P_hat[l - 1])', CDC),
    ('P in the place of P̂', 'ivpt.py', 'P_hat = self.prompts()', 'P_hat = self.P', CDC),
    ('the last layer without prompts', 'ivpt.py', '(z_cls, Z, P_hat[-1])', '(z_cls, Z)', CDC),
    ('the last layer without image tokens', 'ivpt.py', '(z_cls, Z, P_hat[-1])', '(z_cls, P_hat[-1])', CDC),
    ('the head reads what the last LayerNorm has not seen', 'ivpt.py', 'self.head(self.vit.norm(z_cls.squeeze(1)))', 'self.head(z_cls.squeeze(1))', CDC),
    ('the backbone is left trainable', 'ivpt.py', 'vit.requires_grad_(False)', 'vit', LOOP),
    ('the backbone leaves eval mode', 'ivpt.py', '        self.vit.eval()\n', '', VPT),
    ('no prompts are allowed', 'ivpt.py', 'N < 1 or', 'N < 0 or', INPUT),
    ('more reinforcing prompts than image tokens are allowed', 'ivpt.py', '1 <= k <= vit.M', '1 <= k <= 10 * vit.M', INPUT),
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
    ('the test split is the training split', 'data.py', "for name in ('trainval', 'test')", "for name in ('trainval', 'trainval')", DATA),
    ('class ids count from 1', 'data.py', '(path.parent / name, int(label))', '(path.parent / name, int(label) - 1)', DATA),
    # interruptions and the files of a run
    ('a run: random numbers do not depend on the epoch', 'train.py', '1_000_003 * config.seed + epoch', '1_000_003 * config.seed', STOPS),
    ('a run: random numbers of an epoch go on from what was drawn before', 'train.py',
     'torch.manual_seed(1_000_003 * config.seed + epoch)', 'pass', STOPS),
    ('a run: the optimizer starts anew after an interruption', 'train.py', "{'state': newest['optimizer']['state']}", "{'state': {}}", STOPS),
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
    ('a run: parameters of another model are taken in part', 'train.py', 'if shapes(params) != shapes(trained(model))', 'if False', FUZZ),
    ("a run: another program's checkpoint is trusted", 'train.py', 'if not is_checkpoint(checkpoint)', 'if False', FUZZ),
    ("a run: another program's result is trusted", 'train.py', ' and is_result(result)', '', FUZZ),
    ('a run: a name in configs.yaml may be a path', 'train.py', 'or not re.fullmatch(', 'or False and re.fullmatch(', FUZZ),
    ('a run: an alias in YAML is expanded', 'train.py', 'if self.check_event(yaml.AliasEvent)', 'if False', FUZZ),
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
