"""The two lists of mutants.py: mistakes in the method that no rule makes, and changes that change no behaviour."""

TEXT = {  # by file: what is right, and mistakes in its place
    'ivpt.py': {
        # Eq. 4, CDC: its own layer, all layers, the first one, the last one, none, a mean, without a gradient
        'P[1:] + P[:-1]])': ['P[1:] + P[1:]])', 'P[1:] + P[:1]])', 'P[1:]])', 'P[1:] - P[:-1]])',
                             '(P[1:] + P[:-1]) / 2])', 'P[1:] + P[:-1].detach()])'],
        'torch.cat([P[:1], P[1:] + P[:-1]])': ['P + P.roll(1, 0)', 'P.cumsum(0)'],
        # Eq. 5, DA
        'psi(gamma, P[:-1])': ['P[:-1]', 'psi(gamma, P[1:])', 'psi(gamma.roll(1, 0), P[:-1])'],
        'P[1:] + psi(': ['psi('],
        'torch.cat([P[:1], P[1:] + psi(gamma, P[:-1])])': [
            'torch.stack([h := P[0]] + [h := p + g @ h for p, g in zip(P[1:], gamma)])'],
        # Eq. 6, and vanilla CDC
        'return gamma @ P': ['return gamma.mT @ P', 'return gamma.softmax(-1) @ P', 'return gamma.detach() @ P'],
        'P.cumsum(dim=0)': ['P.flip(0).cumsum(dim=0).flip(0)', 'P.cumsum(dim=1)', 'P.detach().cumsum(dim=0)'],
        # Eq. 7, 10, 12 and 13
        '.squeeze(-1) / q.shape[-1] ** 0.5)': ['.squeeze(-1) / p.shape[-1] ** 0.5)', '.squeeze(-1))'],
        'attention_weight(q, W_K, p), attention_weight(q, W_K, p_previous)': [
            'attention_weight(q, W_K, p_previous), attention_weight(q, W_K, p)'],
        'gamma.unsqueeze(-1) * p_previous': ['gamma.mT.unsqueeze(-1) * p_previous'],
        'alpha.unflatten(-1, gamma.shape[-2:])': [
            'gamma * attention_weight(q, W_K, p_previous).unsqueeze(-2)', 'alpha.unflatten(-1, gamma.shape[-2:]).mT'],
        # Eq. 14
        'w.topk(k, dim=-1).indices': ['w.topk(k, dim=-1, largest=False).indices', 'w.topk(k, dim=-1).indices.flip(-1)',
                                      'w.topk(k, dim=-1).indices.sort(dim=-1).values',
                                      'w.mean(0, keepdim=True).expand_as(w).topk(k, dim=-1).indices'],
        'w[:, 1:1 + self.vit.M], self.k': ['w[:, :self.vit.M], self.k', 'w[:, -self.vit.M:], self.k'],
        # Eq. 15
        'Z.scatter_add_(': ['Z.scatter_('],
        'P_re.expand(B, k, D)': ['-P_re.expand(B, k, D)', 'P_re[:1].expand(B, k, D)'],
        '1 + Omega, self.P_re[l])': ['Omega, self.P_re[l])', '1 + Omega, self.P_re[0])'],
        # The layers
        'P_hat = self.prompts()': ['P_hat = self.P'],
        'layer(tokens, P_hat[l], ': ['layer(tokens, P_hat[l - 1], ', 'layer(tokens, P_hat[l] + tokens[:, :1], '],
        'self.vit.last(tokens, P_hat[-1])': ['self.vit.last(tokens)'],
        'self.vit.read(tokens)': ['tokens[:, 0]'],
        # Initial values, and what is trained
        'patch_size ** 2 + D': ['patch_size + D'],
        'uniform_(-bound, bound)': ['uniform_(0, bound)'],
        'torch.eye(N)': ['torch.zeros(N, N)', 'torch.ones(N, N)'],
        'torch.zeros(L - 1, self.k, D)': ['torch.randn(L - 1, self.k, D)', 'torch.zeros(L, self.k, D)'],
        '        init_linear(self.head)\n': [''],
        'vit.requires_grad_(False)': ['vit']},
    'vit.py': {
        'product_attention(q, k, v)': ['product_attention(q, k, v, scale=(q.shape[1] * q.shape[3]) ** -0.5)'],
        '(q / q.shape[-1] ** 0.5 @ k.mT)': ['(q @ k.mT)'],
        'x, *context = (self.norm1(y) for y in (tokens, *context))': ['x = self.norm1(tokens)'],
        'zip((k, v), pair)': ['zip((k, v), pair[::-1])'],
        ', self.qkv.bias[D:]': [''],
        '.transpose(-2, -1) / q.shape[-1] ** 0.5)': ['.mT / self.proj.in_features ** 0.5)'],
        'w.mean(dim=1).squeeze(1)': ['w[:, 0].squeeze(1)', 'w.amax(dim=1).squeeze(1)'],
        'q[:, :, :1]': ['q[:, :, -1:]'],
        'torch.no_grad(), torch.autocast(': ['torch.enable_grad(), torch.autocast('],
        'tokens = tokens + attended': ['tokens = attended'],
        'self.mlp(self.norm2(tokens))': ['self.mlp(tokens)'],
        '[self.cls_token.expand(len(Z), -1, -1), Z]': ['[Z, self.cls_token.expand(len(Z), -1, -1)]'],
        '(tokens[:, 1:], *context)': ['context'],
        'tokens[:, 1:1 + self.M].mean': ['tokens[:, :1 + self.M].mean'],
        'module.weight, std=0.02': ['module.weight, std=0.2']},
    'train.py': {
        '(step + 1) / rising': ['step / rising'],
        'math.pi * done': ['math.pi / 2 * done'],
        '(step - rising) / (steps - rising)': ['step / steps'],
        'epoch * steps + step, ': ['step, '],
        '            optimizer.zero_grad()\n': [''],
        'loop.momentum, weight_decay=loop.weight_decay': ['weight_decay=loop.weight_decay', 'loop.momentum'],
        "'weight_decay': 0.0": ["'weight_decay': loop.weight_decay"],
        " or 'gamma' in name.split('.')": [''],
        'task.loss(model(images), labels)': ['task.loss(model(images), labels, label_smoothing=0.1)']}}

# Why a mutant changes nothing that counts, by its name: that has no line and no column, and is for all of a function.
EQUIVALENT = {
    'ivpt.py top_k keyword: return w.topk(k, dim=-1).indices -> return w.topk(k, ).indices': "-1 is topk's default",
    "vit.py to_timm constant: P = state.get('pos_embed', torch.ones(1)) -> P = state.get('pos_embed', torch.ones(0))":
        'no number or one: neither has three dimensions, or 384 at its end',
    'data.py batches arithmetic: generator = torch.Generator().manual_seed(1_000_003 * loop.seed + (epoch or 0)) -> '
    'generator = torch.Generator().manual_seed(1_000_003 * loop.seed - (epoch or 0))':
        'other random numbers, as different for each seed and epoch',
    'tests/experiments/noise.py accuracy constant: generator = torch.Generator().manual_seed(0) -> '
    'generator = torch.Generator().manual_seed(1)': 'another noise, the same for all runs',
    'tests/experiments/swin.py Swin.from_checkpoint constant: state = vit.to_timm(state, self.blocks[0].attn.N_h) -> '
    'state = vit.to_timm(state, self.blocks[1].attn.N_h)': 'read for the first JAX release alone, which has no Swin',
    'tests/experiments/curves.py lines constant: below = 1000 + 50 * i -> below = 1000 + 51 * i':
        'half a pixel more between two rows of a legend',
    "tests/experiments/shapes.py shapes negate: how, framed = (options, settings.backbone.img_size), options.ask == "
    "'frame' -> how, framed = (options, settings.backbone.img_size), options.ask != 'frame'":
        'pre-training and the other tasks exchange their seeds',
    "tests/experiments/curves.py lines constant: draw.line([(140, y_at(y)), (1560, y_at(y))], '#dddddd', 2) -> "
    "draw.line([(141, y_at(y)), (1560, y_at(y))], '#dddddd', 2)": 'half a pixel of a line',
    'tests/experiments/curves.py lines constant: marked(draw, [(180, below), (250, below), (320, below)], i) -> '
    'marked(draw, [(181, below), (250, below), (320, below)], i)': 'half a pixel of a mark',
    'tests/experiments/curves.py marked constant: draw.regular_polygon((x, y, 13), sides, 0, inside, colour, 4) -> '
    'draw.regular_polygon((x, y, 13), sides, 0, inside, colour, 5)': 'half a pixel of an outline',
    "tests/experiments/sweep.py take_grid argument: if not getattr(args, 'search', True): -> "
    "if not getattr(args, 'search', args):": 'args is true, too',
    "tests/experiments/finished.py alike boundary: return all(x == other[name] or name == 'probability' and "
    "abs(float(x) - float(other[name])) < ROUNDING -> return all(x == other[name] or name == 'probability' and "
    "abs(float(x) - float(other[name])) <= ROUNDING": 'a difference of exactly ROUNDING',
    "tests/experiments/noise.py with_noise keyword: train.write(path, json.dumps({'params_digest': digest, 'accuracy': "
    "after}, indent=1).encode()) -> train.write(path, json.dumps({'params_digest': digest, 'accuracy': after}, "
    ").encode())": 'the same JSON in one line',
    'tests/experiments/look.py labelled constant: draw.rectangle((0, TILE - 15, 4 + font.getlength(words), TILE), '
    "fill='black') -> draw.rectangle((0, TILE - 15, 5 + font.getlength(words), TILE), fill='black')": 'a pixel',
    'tests/experiments/look.py labelled constant: draw.rectangle((0, TILE - 15, 4 + font.getlength(words), TILE), '
    "fill='black') -> draw.rectangle((0, TILE - 16, 4 + font.getlength(words), TILE), fill='black')": 'a pixel',
    "tests/experiments/look.py labelled constant: draw.text((2, TILE - 15), words, fill='white', font=font) -> "
    "draw.text((3, TILE - 15), words, fill='white', font=font)": 'a pixel',
    "tests/experiments/look.py labelled keyword: draw.text((2, TILE - 15), words, fill='white', font=font) -> "
    'draw.text((2, TILE - 15), words, font=font)': "white is Pillow's default",
    "tests/experiments/look.py main keyword: options.add_argument('--image', nargs='+', default=[], metavar='FILE', "
    "action='extend', -> options.add_argument('--image', nargs='+', default=[], action='extend',":
        'a word of --help, IMAGE for FILE'}
