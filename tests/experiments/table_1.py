"""Table 1 on one page: the systems that the paper compares itself with, each on the same frozen ViT.

A system is a function of the plain ViT without its head, the number of classes and the settings, to a module from
images [B, 3, H, W] to logits [B, C]; s is `settings.options`, what its entry in configs.yaml says. Formulas, initial
values and settings are those of the authors' code, or of their paper where the two differ. Its seams in the ViT, where
x enters a part and y leaves it (other letters: vit.py):

    after(part, f)                       y <- f(y)
    beside(part, f)                      y <- y + f(x)
    layer.shortcut1, layer.shortcut2     around MSA, around the MLP: x <- f(x)
    layer.between                        between the two, for branch and shortcut: x <- f(x)
    layer.prompts                        further tokens f(x) [B, n, D] for MSA's keys and values
"""

from bisect import bisect_right

import torch
import torch.nn.functional as F
from torch import nn

from vit import InputError, init_linear


def after(part, f):
    part.side = f
    part.register_forward_hook(lambda part, inputs, y: part.side(y))


def beside(part, f):
    part.side = f
    part.register_forward_hook(lambda part, inputs, y: y + part.side(*inputs))


class Side(nn.Module):
    """f(x, p), with numbers p of its own that are trained."""

    def __init__(self, f, **p):
        super().__init__()
        self.f = f
        for name, x in p.items():
            setattr(self, name, nn.Parameter(x))

    def forward(self, x):
        return self.f(x, self)


def uniform(bound, *shape):
    return torch.empty(shape).uniform_(-bound, bound)


class Layer(nn.Module):
    """A layer of the ViT with its seams. In training, a branch of an image is left out with probability drop_path."""

    def __init__(self, layer, drop_path):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp
        self.shortcut1, self.between, self.shortcut2 = nn.Identity(), nn.Identity(), nn.Identity()
        self.prompts, self.drop_path = None, drop_path

    def forward(self, x, need_weights=True):
        context = [self.norm1(self.prompts(x))] if self.prompts else []
        y, w = self.attn(self.norm1(x), *context, need_weights=need_weights)
        keep1, keep2 = F.dropout(x.new_ones(2, len(x), 1, 1), self.drop_path, self.training)
        x = self.between(self.shortcut1(x) + keep1 * y)
        return self.shortcut2(x) + keep2 * self.mlp(self.norm2(x)), w


class Tuned(nn.Module):
    """The frozen ViT with its seams, and a linear head. drop_path grows from 0 to s.drop_path over the layers."""

    def __init__(self, vit, num_classes, settings):
        super().__init__()
        if not hasattr(vit, 'embed'):
            raise InputError(f'the systems of Table 1 are made for a plain ViT, and this is a {type(vit).__name__}')
        self.vit, self.s = vit.requires_grad_(False), settings.options
        rates = [self.s.drop_path * l / max(1, vit.L - 1) for l in range(vit.L)]
        vit.blocks = nn.ModuleList(Layer(x, rate) for x, rate in zip(vit.blocks, rates))
        self.head = nn.Linear(vit.D, num_classes)
        init_linear(self.head)

    def forward(self, images):
        x = self.vit.embed(images)  # [B, 1 + M, D]
        for layer in self.vit.blocks:
            x, _ = layer(x, need_weights=False)
        return self.head(self.vit.read(x))


def in_every_layer(change):
    """The system that changes every layer alike: change(layer, D, s)."""
    def system(vit, num_classes, settings):
        model = Tuned(vit, num_classes, settings)
        for layer in vit.blocks:
            change(layer, vit.D, settings.options)
        return model
    return system


@in_every_layer
def adapter(layer, D, s):
    """Adapter (Houlsby et al., 2019; Pfeiffer et al., 2020): after the MLP y <- y + U gelu(W y + c) + e. At the start,
    U = e = 0; with `zeros`, as in VPT's code and so in Table 1, W = 0 too. Then gelu(0) = 0 leaves U without a gradient
    and U = 0 leaves W and c without, for good: of 0.23M numbers 9,216, e, are trained."""
    r, bound = max(1, D // s.reduction), 0 if s.zeros else D ** -0.5
    after(layer.mlp, Side(lambda y, p: y + F.linear(F.gelu(F.linear(y, p.W, p.c)), p.U, p.e),
                          W=uniform(bound, r, D), c=torch.zeros(r), U=torch.zeros(D, r), e=torch.zeros(D)))


@in_every_layer
def adaptformer(layer, D, s):
    """AdaptFormer (Chen et al., 2022): around the MLP x <- x + scale (U relu(W x + c) + e), without LayerNorm."""
    def f(x, p):
        h = F.dropout(F.relu(F.linear(x, p.W, p.c)), s.dropout, p.training)
        return x + s.scale * F.linear(h, p.U, p.e)
    layer.shortcut2 = Side(f, W=uniform(D ** -0.5, s.r, D), c=torch.zeros(s.r), U=torch.zeros(D, s.r), e=torch.zeros(D))


@in_every_layer
def bi_adapter(layer, D, s):
    """Bi-Adapter (Jie et al., 2023): AdaptFormer without biases, its matrices two-valued: m ± 0.674 σ, of mean m and
    standard deviation σ. The gradient passes the signs as if they were not there. U starts near 0: 0 has no σ."""
    def two_valued(W):
        m, sigma = W.mean(), W.std()
        w = (W - m) / (sigma + 1e-5)
        return ((0.6744897502 * w.sign() - w).detach() + w) * sigma + m

    def f(x, p):
        h = F.dropout(F.relu(F.linear(x, two_valued(p.W))), s.dropout, p.training)
        return x + s.scale * F.linear(h, two_valued(p.U))
    U = nn.init.trunc_normal_(torch.empty(D, s.r), std=0.001, a=-0.002, b=0.002)
    layer.shortcut2 = Side(f, W=uniform(D ** -0.5, s.r, D), U=U)


@in_every_layer
def lora(layer, D, s):
    """LoRA (Hu et al., 2022): y <- y + scale B A x for queries, keys and values, which share A. At the start
    B = 0; in NOAH's code (Zhang et al., 2022), where Table 1's row is from, the ViT's initial values overwrite it."""
    beside(layer.attn.qkv, Side(lambda x, p: s.scale * (F.dropout(x, s.dropout, p.training) @ p.A.T @ p.B.T),
                                A=uniform(D ** -0.5, s.r, D), B=torch.zeros(3 * D, s.r)))


def fact(vit, num_classes, settings):
    """FacT (Jie and Deng, 2023), Tucker's form: y <- y + scale V T_jᵀ U x for each D x D matrix j of the ViT, T_j
    being slice j of C P [r, r, 12 L]. V = 0 at the start. The published numbers are from code that reshapes the four
    slices of fc1 and of fc2, [r, r, 4], to [r, 4 r] and so mixes them."""
    def f(x, p):
        q, j = p.factors
        T = (q.C @ q.P[:, j]).unbind(-1)
        low = [x_j @ q.U.T for x_j in x.split(D, dim=-1)]  # one, but four of fc2
        low = [low[0] @ T_j for T_j in T] if len(low) == 1 else [sum(z @ T_j.T for z, T_j in zip(low, T))]
        return s.scale * torch.cat([F.dropout(z, s.dropout, p.training) @ q.V.T for z in low], dim=-1)
    model, s = Tuned(vit, num_classes, settings), settings.options
    D, r, J = vit.D, s.r, 12 * vit.L
    model.factors = Side(None, U=uniform(D ** -0.5, r, D), V=torch.zeros(D, r),
                         C=uniform(3 ** 0.5 / r, r, r, r), P=uniform((6 / (r + J)) ** 0.5, r, J))
    for l, layer in enumerate(vit.blocks):
        for part, j, n in (layer.attn.qkv, 0, 3), (layer.attn.proj, 3, 1), (layer.mlp.fc1, 4, 4), (layer.mlp.fc2, 8, 4):
            beside(part, Side(f))
            part.side.factors = model.factors, range(12 * l + j, 12 * l + j + n)  # a tuple: they are saved once
    return model


def ssf(vit, num_classes, settings):
    """SSF (Lian et al., 2022): y <- γ ⊙ y + β after the patch embedding, every linear map and every LayerNorm."""
    model = Tuned(vit, num_classes, settings)
    for part in [vit.patch_embed, *(part for part in vit.modules() if isinstance(part, (nn.Linear, nn.LayerNorm)))]:
        D = vit.D if part is vit.patch_embed else len(part.bias)
        gamma, beta = 1 + 0.02 * torch.randn(D), 0.02 * torch.randn(D)
        after(part, Side(lambda y, p: p.gamma * y + p.beta, gamma=gamma, beta=beta))
    return model


@in_every_layer
def snf(layer, D, s):
    """SNF (Wang et al., 2023): on both shortcuts x <- z_n, a flow: z_0 = μ + exp(λ) ⊙ x and, for i = 1 to n,
    z_i = z_{i-1} + u_i tanh(w_i · z_{i-1} + c_i)."""
    def f(x, p):
        z = p.mu + p.lam.exp() * x
        for w, c, u in zip(p.w, p.c, p.u):
            z = z + u * torch.tanh(z @ w + c).unsqueeze(-1)
        return z
    layer.shortcut1, layer.shortcut2 = (Side(f, mu=torch.zeros(D), lam=torch.zeros(D), c=uniform(0.01, s.n),
                                             w=uniform(0.01, s.n, D), u=uniform(0.01, s.n, D)) for _ in range(2))


class SalientChannels(Tuned):
    @torch.no_grad()
    def prepare(self, batches):
        """Find I in the ViT alone: the channels of what enters norm2 with the largest norm over the image tokens of all
        pictures of a class, as a mean over the classes that there are."""
        squares = torch.zeros(self.vit.L, *self.head.weight.shape, dtype=torch.float64)  # on the CPU: MPS has none
        for images, labels in batches:
            x = self.vit.embed(images)
            for layer, square in zip(self.vit.blocks, squares):
                x = x + layer.attn(layer.norm1(x), need_weights=False)[0]
                square.index_add_(0, labels.cpu(), x[:, 1:].cpu().double().pow(2).sum(dim=1))
                x = x + layer.mlp(layer.norm2(x))
        for layer, square in zip(self.vit.blocks, squares):
            norms = square[square.any(dim=1)].sqrt().mean(dim=0)  # [D]
            layer.between.I.copy_(norms.topk(len(layer.between.I)).indices.sort().values)


def sct(vit, num_classes, settings):
    """SCT (Zhao et al., 2023): before the MLP x[I] <- x[I] + scale (W x[I] + b), K channels. Released with scale 1."""
    model, s = SalientChannels(vit, num_classes, settings), settings.options
    K = max(1, vit.D // s.part)
    for layer in vit.blocks:
        layer.between = Side(lambda x, p: x.index_copy(-1, p.I, x[..., p.I] + s.scale * (x[..., p.I] @ p.W.T + p.b)),
                             W=nn.init.trunc_normal_(torch.empty(K, K), std=0.02), b=torch.zeros(K))
        layer.between.register_buffer('I', torch.full([K], -1))  # no channel, until `prepare`
    return model


class Sensitive(nn.Module):
    """What SPT adds beside a linear map or a LayerNorm with [W, b] [o, i + 1]: v at its positions `at`, and B A in some
    of its n parts (qkv has three), `parts`. Nothing at the start."""

    def __init__(self, part, s):
        super().__init__()
        self.s, self.norm, self.o, self.i = s, isinstance(part, nn.LayerNorm), len(part.bias), part.weight[0].numel()
        self.n = 3 if self.o == 3 * self.i else 1
        self.take(*torch.zeros(2, 0, dtype=torch.int64, device=part.weight.device))

    def take(self, parts, at):
        self.register_buffer('parts', parts)
        self.register_buffer('at', at)
        self.v = nn.Parameter(torch.zeros(len(at), device=at.device))
        self.A = nn.Parameter(uniform(self.i ** -0.5, len(parts), self.s.r, self.i).to(at.device))
        self.B = nn.Parameter(torch.zeros(len(parts), self.o // self.n, self.s.r, device=at.device))

    def forward(self, x):
        d = self.v.new_zeros(self.o * (self.i + 1)).index_put((self.at,), self.v).view(self.o, -1)
        W, b = d[:, :-1], d[:, -1]
        if self.norm:
            return F.layer_norm(x, b.shape, W[:, 0], b, eps=1e-6)
        BAx = torch.einsum('...i,kri,kor->...ko', F.dropout(x, self.s.dropout, self.training), self.A, self.B)
        return F.linear(x, W, b).unflatten(-1, (self.n, -1)).index_add(-2, self.parts, BAx).flatten(-2)

    def structure(self, M):
        """Of sensitive numbers, a mask M [o, i + 1]: the parts that get B A, what else is trained, how many in all."""
        M, parts, cost = M.clone(), [], self.s.r * (self.i + self.o // self.n)
        for j, rows in enumerate(M.chunk(self.n)):
            if not self.norm and rows[:, :-1].sum() >= cost / self.s.alpha:
                parts.append(j)
                rows[:, :-1] = False
            for vector in rows.T if self.norm else rows.T[-1:]:
                vector |= vector.sum() >= len(vector) / self.s.beta
        return parts, M, cost * len(parts) + int(M.sum())

    def _load_from_state_dict(self, state, prefix, *rest):  # the shapes depend on the pictures
        parts, at = (state.get(prefix + name, getattr(self, name)).to(self.at.device) for name in ('parts', 'at'))
        if parts.shape != self.parts.shape or at.shape != self.at.shape:
            self.take(parts, at)
        super()._load_from_state_dict(state, prefix, *rest)


class SPT(Tuned):
    def prepare(self, batches):
        """Find S, how sensitive the loss is to each number: the sum over 16 batches of its squared gradient."""
        W_b, S = [p.requires_grad_() for part in self.parts for p in (part.weight, part.bias)], [0] * len(self.parts)
        for _, (images, labels) in zip(range(16), batches):
            grads = torch.autograd.grad(F.cross_entropy(self.eval()(images), labels), W_b)
            S = [x + torch.cat([W.reshape(len(b), -1), b[:, None]], dim=1) ** 2
                 for x, W, b in zip(S, grads[::2], grads[1::2])]
        self.vit.requires_grad_(False).cls_token.requires_grad_()
        self.choose(S, self.s.budget * sum(p.numel() for p in self.vit.parameters()))

    def choose(self, S, budget):
        """Choose what is trained: what follows from as many of the most sensitive numbers as the budget allows."""
        def structures(n):
            M = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:n], True).split([x.numel() for x in S])
            return [part.side.structure(m.view(x.shape)) for part, m, x in zip(self.parts, M, S)]
        order, budget = torch.cat([x.flatten() for x in S]).argsort(descending=True, stable=True), budget - self.vit.D
        n = bisect_right(range(1, len(order) + 1), budget, key=lambda n: sum(count for *_, count in structures(n)))
        for part, (parts, M, _) in zip(self.parts, structures(n)):
            part.side.take(torch.tensor(parts, dtype=torch.int64, device=M.device), M.flatten().nonzero()[:, 0])


def spt(vit, num_classes, settings):
    """SPT (He et al., 2023) with LoRA: y <- y + v x + B A x. v are the single numbers of [W, b] to which the loss is
    most sensitive; a matrix in which they are 1 / alpha of B A's size gets B A instead, and a vector of which they are
    1 / beta is trained as a whole; and so is the class token. B = v = 0 at the start."""
    model = SPT(vit, num_classes, settings)
    model.parts = [part for part in vit.modules() if isinstance(part, (nn.Linear, nn.LayerNorm))]
    vit.cls_token.requires_grad_()
    for part in model.parts:
        beside(part, Sensitive(part, settings.options))
    return model


def e2vpt(vit, num_classes, settings):
    """E2VPT (Han et al., 2023) without its pruning: in every layer N prompts P, as in VPT, and N_kv more keys E,
    which are values too, behind W_K and W_V."""
    def more(qkv, p):  # their queries are 0, and what these find is cut off after proj
        return torch.cat([qkv, torch.cat([0 * p.E, p.E, p.E], dim=-1).expand(len(qkv), -1, -1)], dim=1)
    model, s, N = Tuned(vit, num_classes, settings), settings.options, settings.prompts.N
    bound = (6 / (3 * vit.patch_size ** 2 + vit.D)) ** 0.5
    for layer in vit.blocks:
        layer.prompts = Side(lambda x, p: F.dropout(p.P.expand(len(x), -1, -1), s.dropout, p.training),
                             P=uniform(bound, N, vit.D))
        after(layer.attn.qkv, Side(more, E=uniform((6 * layer.attn.N_h / (s.N_kv * vit.D)) ** 0.5, s.N_kv, vit.D)))
        after(layer.attn.proj, lambda y: y[:, :-s.N_kv])
    return model


class GaPT(Tuned):
    def forward(self, images):
        x, M = self.vit.embed(images), 1 + self.vit.M
        P = F.dropout(self.P.expand(len(x), -1, -1), self.s.dropout, self.training)
        for layer, g in zip(self.vit.blocks, [*self.a.sigmoid(), 1]):
            y, _ = layer(torch.cat([x[:, :M], P], dim=1), need_weights=False)
            x, P = y[:, :M], g * y[:, M:] + (1 - g) * P
        return self.head(self.vit.read(x))


def gapt(vit, num_classes, settings):
    """GaPT (Yoo et al., 2023): prompts P are tokens, P <- g 𝒯(P) + (1 - g) P after each layer 𝒯 but the last; g = σ(a)
    are gates. Attention is softmax(q kᵀ / (τ sqrt(d))), with τ from 0.01 to 10."""
    def divide(qkv, p):
        p.tau.data.clamp_(0.01, 10)  # in place: beyond its limits a clamped τ would get no gradient
        return torch.cat([qkv[..., :vit.D] / p.tau, qkv[..., vit.D:]], dim=-1)
    model, bound = GaPT(vit, num_classes, settings), (6 / (3 * vit.patch_size ** 2 + vit.D)) ** 0.5
    model.P = nn.Parameter(uniform(bound, 1, settings.prompts.N, vit.D))
    model.a = nn.Parameter(-settings.options.gate * torch.ones(vit.L - 1))
    for layer in vit.blocks:
        after(layer.attn.qkv, Side(divide, tau=torch.ones([])))
    return model
