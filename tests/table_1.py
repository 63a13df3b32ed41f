"""Table 1 on one page: the systems that the paper compares itself with, each on the same frozen ViT.

A system is a function with the name that it has in configs.yaml. It takes the plain ViT without its head, the number
of classes and the settings s, and returns a module from images [B, 3, H, W] to logits [B, C], in which that is trained
which requires a gradient. Letters are those of vit.py; x enters a part of the ViT and y leaves it. A system comes in at

    after(part, f)                       y <- f(y)
    beside(part, f)                      y <- y + f(x)
    layer.shortcut1, layer.shortcut2     around MSA, around the MLP: x <- f(x)
    layer.between                        between the two, for branch and shortcut: x <- f(x)
    layer.prompts                        further tokens for MSA's keys and values: [B, n, D] <- f(x)

Formulas, initial values and settings are those of the authors' code, or the paper's where the code differs.
"""

from bisect import bisect_right
from functools import wraps
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from vit import init_linear


def after(part, f):
    part.side = f
    part.register_forward_hook(lambda part, inputs, y: part.side(y))


def beside(part, f):
    part.side = f
    part.register_forward_hook(lambda part, inputs, y: y + part.side(*inputs))


class Side(nn.Module):
    """f(x, p) with numbers p of its own, which are trained, or only kept if they are whole numbers."""

    def __init__(self, f, **numbers):
        super().__init__()
        self.f = f
        for name, x in numbers.items():
            if x.is_floating_point():
                setattr(self, name, x if isinstance(x, nn.Parameter) else nn.Parameter(x))
            else:
                self.register_buffer(name, x)

    def forward(self, x):
        return self.f(x, self)


def uniform(bound, *shape):
    return torch.empty(shape).uniform_(-bound, bound)


class Layer(nn.Module):
    """A layer of the ViT (vit.Layer) with its seams, and with stochastic depth: in training, each branch of an image
    is left out with probability drop_path."""

    def __init__(self, layer, drop_path):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp
        self.shortcut1, self.between, self.shortcut2 = nn.Identity(), nn.Identity(), nn.Identity()
        self.prompts, self.drop_path = None, drop_path

    def forward(self, x, need_weights=True):
        context = [self.norm1(self.prompts(x))] if self.prompts else []
        y, w = self.attn(self.norm1(x), *context, need_weights=need_weights)
        x = self.between(self.shortcut1(x) + self.drop(y))
        return self.shortcut2(x) + self.drop(self.mlp(self.norm2(x))), w

    def drop(self, y):
        if not self.training or not self.drop_path:
            return y
        return y * y.new_empty(len(y), 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)


class Tuned(nn.Module):
    """The frozen ViT with its seams, and a linear head. drop_path grows from 0 in the first layer to s.drop_path."""

    def __init__(self, vit, num_classes, s):
        super().__init__()
        self.vit, self.s = vit.requires_grad_(False), s
        vit.blocks = nn.ModuleList(Layer(layer, s.drop_path * l / max(1, vit.L - 1))
                                   for l, layer in enumerate(vit.blocks))
        self.head = nn.Linear(vit.D, num_classes)
        init_linear(self.head)

    def forward(self, images):
        x = self.vit.embed(images)  # [B, 1 + M, D]
        for layer in self.vit.blocks:
            x, _ = layer(x, need_weights=False)
        return self.head(self.vit.norm(x[:, 0]))


def in_every_layer(change):
    """The system that changes every layer alike: change(layer, D, s)."""
    @wraps(change)
    def system(vit, num_classes, s):
        model = Tuned(vit, num_classes, s)
        for layer in vit.blocks:
            change(layer, vit.D, s)
        return model
    return system


@in_every_layer
def adapter(layer, D, s):
    """Adapter (Houlsby et al., 2019; Pfeiffer et al., 2020): after the MLP y <- y + U gelu(W y + c) + e. Starts as the
    ViT: U = e = 0."""
    def f(y, p):
        return y + F.linear(F.gelu(F.linear(y, p.W, p.c)), p.U, p.e)
    r = max(1, D // s.reduction)
    after(layer.mlp, Side(f, W=uniform(D ** -0.5, r, D), c=torch.zeros(r), U=torch.zeros(D, r), e=torch.zeros(D)))


def adapter_vpt(vit, num_classes, s):
    """Adapter as VPT's code has it, and so Table 1: W = U = 0. gelu(0) = 0 leaves U without a gradient and U = 0 leaves
    W and c without, for good: of 0.23M numbers e alone is trained, 9,216."""
    model = adapter(vit, num_classes, s)
    for layer in vit.blocks:
        nn.init.zeros_(layer.mlp.side.W)
    return model


@in_every_layer
def adaptformer(layer, D, s):
    """AdaptFormer (Chen et al., 2022): around the MLP x <- x + s (U relu(W x + c) + e), of x without LayerNorm."""
    def f(x, p):
        h = F.dropout(F.relu(F.linear(x, p.W, p.c)), s.dropout, p.training)
        return x + s.scale * F.linear(h, p.U, p.e)
    layer.shortcut2 = Side(f, W=uniform(D ** -0.5, s.r, D), c=torch.zeros(s.r), U=torch.zeros(D, s.r), e=torch.zeros(D))


def two_valued(W):
    """m ± 0.674 σ by the signs of W - m, m and σ being W's mean and standard deviation (0.674: half of |N(0, 1)| is
    below). The gradient passes the signs as if they were not there."""
    m, sigma = W.mean(), W.std()
    w = (W - m) / (sigma + 1e-5)
    return ((0.6744897502 * w.sign() - w).detach() + w) * sigma + m


@in_every_layer
def bi_adapter(layer, D, s):
    """Bi-Adapter (Jie et al., 2023): AdaptFormer without biases, its matrices two-valued. U = 0 would have no σ."""
    def f(x, p):
        h = F.dropout(F.relu(F.linear(x, two_valued(p.W))), s.dropout, p.training)
        return x + s.scale * F.linear(h, two_valued(p.U))
    U = nn.init.trunc_normal_(torch.empty(D, s.r), std=0.001, a=-0.002, b=0.002)
    layer.shortcut2 = Side(f, W=uniform(D ** -0.5, s.r, D), U=U)


@in_every_layer
def lora(layer, D, s):
    """LoRA (Hu et al., 2022): y <- y + s B A x at queries, keys and values, which share A. Starts as the ViT: B = 0, which
    the code that Table 1's row is from (NOAH: Zhang et al., 2022) overwrites when it initialises the ViT."""
    def f(x, p):
        return s.scale * (F.dropout(x, s.dropout, p.training) @ p.A.T @ p.B.T)
    beside(layer.attn.qkv, Side(f, A=uniform(D ** -0.5, s.r, D), B=torch.zeros(3 * D, s.r)))


def slices(C, P):
    return (C @ P).unbind(-1)


def fact(vit, num_classes, s):
    """FacT (Jie and Deng, 2023), Tucker's form: y <- y + s V T_jᵀ U x at each D x D matrix j of the ViT. U, V, C and P
    are shared, T_j [r, r] is C P's slice j. Starts as the ViT: V = 0. The published numbers are from code that reshapes
    T [r, r, 4] of fc1 and of fc2 to [r, 4 r], whose four parts mix the slices."""
    def f(x, p):  # qkv, proj and fc1: one input, one or more D-wide outputs
        T = slices(p.C, p.P[:, p.j])
        return s.scale * torch.cat([F.dropout(x @ p.U.T @ t, s.dropout, p.training) @ p.V.T for t in T], dim=-1)

    def f2(x, p):  # fc2: four D-wide inputs
        z = sum(part @ p.U.T @ t.T for part, t in zip(x.chunk(4, dim=-1), slices(p.C, p.P[:, p.j])))
        return s.scale * (F.dropout(z, s.dropout, p.training) @ p.V.T)

    model, D, r, n = Tuned(vit, num_classes, s), vit.D, s.r, 12 * vit.L
    U, V = nn.Parameter(uniform(D ** -0.5, r, D)), nn.Parameter(torch.zeros(D, r))
    C, P = nn.Parameter(uniform(3 ** 0.5 / r, r, r, r)), nn.Parameter(uniform((6 / (r + n)) ** 0.5, r, n))
    for layer, columns in zip(vit.blocks, torch.arange(n).split(12)):
        parts = layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2
        for part, j in zip(parts, columns.split([3, 1, 4, 4])):
            beside(part, Side(f2 if part is layer.mlp.fc2 else f, U=U, V=V, C=C, P=P, j=j))
    return model


def ssf(vit, num_classes, s):
    """SSF (Lian et al., 2022): y <- γ ⊙ y + β after the patch embedding, every linear map and every LayerNorm."""
    def f(y, p):
        return p.gamma * y + p.beta
    model = Tuned(vit, num_classes, s)
    for part in [p for p in vit.modules() if p is vit.patch_embed or isinstance(p, (nn.Linear, nn.LayerNorm))]:
        D = vit.D if part is vit.patch_embed else len(part.bias)
        after(part, Side(f, gamma=1 + 0.02 * torch.randn(D), beta=0.02 * torch.randn(D)))
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

    layer.shortcut1, layer.shortcut2 = (
        Side(f, mu=torch.zeros(D), lam=torch.zeros(D), w=uniform(0.01, s.n, D), c=uniform(0.01, s.n),
             u=uniform(0.01, s.n, D)) for _ in range(2))


class SalientChannels(Tuned):
    @torch.no_grad()
    def prepare(self, batches):
        """Find each layer's I, with the ViT alone: the channels of what enters norm2 with the largest norm over the
        image tokens of all pictures of a class, on average over the classes that there are."""
        squares = torch.zeros(self.vit.L, self.head.out_features, self.vit.D, device=self.head.weight.device)
        for images, labels in batches:
            x = self.vit.embed(images)
            for layer, square in zip(self.vit.blocks, squares):
                x = x + layer.attn(layer.norm1(x), need_weights=False)[0]
                square.index_add_(0, labels, x[:, 1:].pow(2).sum(dim=1))
                x = x + layer.mlp(layer.norm2(x))
        for layer, square in zip(self.vit.blocks, squares):
            norms = square[square.any(dim=1)].sqrt().mean(dim=0)  # [D]
            layer.between.I.copy_(norms.topk(len(layer.between.I)).indices.sort().values)


def sct(vit, num_classes, s):
    """SCT (Zhao et al., 2023): between MSA and MLP x[I] <- x[I] + s (W x[I] + b), at D / part channels I. The released
    code has s taken out: s = 1."""
    def f(x, p):
        return x.index_copy(-1, p.I, x[..., p.I] + s.scale * F.linear(x[..., p.I], p.W, p.b))
    model, K = SalientChannels(vit, num_classes, s), max(1, vit.D // s.part)
    for layer in vit.blocks:
        W = nn.init.trunc_normal_(torch.empty(K, K), std=0.02)
        layer.between = Side(f, W=W, b=torch.zeros(K), I=torch.full([K], -1))  # no channel, until `prepare`
    return model


class Sensitive(nn.Module):
    """What SPT adds beside a linear map or a LayerNorm with [W, b] [o, i + 1]: v to its numbers at `at`, and B A to those
    of its n parts (qkv has three) in `parts`. Nothing at the start."""

    def __init__(self, part, s):
        super().__init__()
        self.s, self.norm, self.o, self.i = s, isinstance(part, nn.LayerNorm), len(part.bias), part.weight[0].numel()
        self.n = 3 if self.o == 3 * self.i else 1
        self.take(*torch.zeros(2, 0, dtype=torch.int64))

    def take(self, parts, at):
        self.register_buffer('parts', parts)
        self.register_buffer('at', at)
        zeros, r = at.new_zeros(0, dtype=torch.float).new_zeros, self.s.r
        self.v, self.B = nn.Parameter(zeros(len(at))), nn.Parameter(zeros(len(parts), self.o // self.n, r))
        self.A = nn.Parameter(zeros(len(parts), r, self.i).uniform_(-self.i ** -0.5, self.i ** -0.5))

    def forward(self, x):
        d = self.v.new_zeros(self.o * (self.i + 1)).index_put((self.at,), self.v).view(self.o, -1)
        W, b = d[:, :-1], d[:, -1]
        if self.norm:
            return F.layer_norm(x, b.shape, W[:, 0], b, eps=1e-6)
        BAx = torch.einsum('...i,kri,kor->...ko', F.dropout(x, self.s.dropout, self.training), self.A, self.B)
        return F.linear(x, W, b).unflatten(-1, (self.n, -1)).index_add(-2, self.parts, BAx).flatten(-2)

    def structure(self, M):
        """Of sensitive numbers M [o, i + 1]: the parts that get B A, M without them and with whole vectors, the count."""
        M, parts, cost = M.clone(), [], self.s.r * (self.i + self.o // self.n)
        for j, rows in enumerate(M.chunk(self.n)):
            if not self.norm and rows[:, :-1].sum() >= cost / self.s.alpha:
                parts.append(j)
                rows[:, :-1] = False
            for vector in rows.T if self.norm else rows.T[-1:]:
                vector |= vector.sum() >= len(vector) / self.s.beta
        return torch.tensor(parts, dtype=torch.int64, device=M.device), M, cost * len(parts) + int(M.sum())

    def _load_from_state_dict(self, state, prefix, *rest):
        parts, at = (state.get(prefix + name, getattr(self, name)).to(self.at.device) for name in ('parts', 'at'))
        if parts.shape != self.parts.shape or at.shape != self.at.shape:
            self.take(parts, at)
        super()._load_from_state_dict(state, prefix, *rest)


class SPT(Tuned):
    def prepare(self, batches):
        """Choose what is trained: what follows from as many most sensitive numbers as the budget allows, which is a
        part of the ViT's parameters. Makes parameters."""
        sites = [part for part in self.vit.modules() if hasattr(part, 'side')]
        S = self.sensitivities(sites, batches)
        order = torch.cat([x.flatten() for x in S]).argsort(descending=True, stable=True)

        def structures(n):
            M = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:n], True).split([x.numel() for x in S])
            return [site.side.structure(m.view(x.shape)) for site, m, x in zip(sites, M, S)]

        def count(n):
            return self.vit.D + sum(c for *_, c in structures(n))
        most = self.s.budget * sum(p.numel() for p in self.vit.parameters())
        n = bisect_right(range(len(order)), most, key=count) - 1
        for site, (parts, M, _) in zip(sites, structures(max(0, n))):
            site.side.take(parts, M.flatten().nonzero()[:, 0])

    def sensitivities(self, sites, batches):
        """Of every number in [W, b] of the sites: the sum over at most 16 batches of its gradient, squared."""
        W_b = [p.requires_grad_() for site in sites for p in (site.weight, site.bias)]
        S = [0] * len(sites)
        for images, labels in islice(batches, 16):
            grads = torch.autograd.grad(F.cross_entropy(self.eval()(images), labels), W_b)
            S = [x + torch.cat([W.reshape(len(b), -1), b[:, None]], dim=1) ** 2
                 for x, W, b in zip(S, grads[::2], grads[1::2])]
        for p in W_b:
            p.requires_grad_(False)
        return S


def spt(vit, num_classes, s):
    """SPT (He et al., 2023) with LoRA: y <- y + v x + B A x, at single weights and whole matrices to which the loss is
    most sensitive; biases and LayerNorms likewise, and the class token. A matrix gets B A, or a vector is trained as a
    whole, if 1 / alpha of what B A costs, or 1 / beta of the vector, is sensitive."""
    model = SPT(vit, num_classes, s)
    vit.cls_token.requires_grad_()
    for part in [part for part in vit.modules() if isinstance(part, (nn.Linear, nn.LayerNorm))]:
        beside(part, Sensitive(part, s))
    return model


def prompts(vit, N):
    return uniform((6 / (3 * vit.patch_size ** 2 + vit.D)) ** 0.5, N, vit.D)  # VPT's initial values


def e2vpt(vit, num_classes, s):
    """E2VPT (Han et al., 2023) without its pruning: in every layer N prompts P, as in VPT, and N_kv more keys E behind
    W_K, which are more values as well."""
    def P(x, p):
        return F.dropout(p.P.expand(len(x), -1, -1), s.dropout, p.training)

    def E(qkv, p):
        E = p.E.transpose(0, 1).flatten(1)  # [N_kv, D]; its queries are 0, and what they get is cut off after proj
        return torch.cat([qkv, torch.cat([0 * E, E, E], dim=-1).expand(len(qkv), -1, -1)], dim=1)
    model = Tuned(vit, num_classes, s)
    for layer in vit.blocks:
        N_h, d = layer.attn.N_h, vit.D // layer.attn.N_h
        layer.prompts = Side(P, P=prompts(vit, s.N))
        after(layer.attn.qkv, Side(E, E=uniform((6 / (s.N_kv * d)) ** 0.5, N_h, s.N_kv, d)))
        after(layer.attn.proj, lambda y: y[:, :-s.N_kv])
    return model


class GaPT(Tuned):
    def forward(self, images):
        x, M = self.vit.embed(images), 1 + self.vit.M
        P = F.dropout(self.P.expand(len(x), -1, -1), self.s.dropout, self.training)
        for layer, g in zip(self.vit.blocks, [*self.a.sigmoid(), 1]):
            y, _ = layer(torch.cat([x[:, :M], P], dim=1), need_weights=False)
            x, P = y[:, :M], g * y[:, M:] + (1 - g) * P
        return self.head(self.vit.norm(x[:, 0]))


def gapt(vit, num_classes, s):
    """GaPT (Yoo et al., 2023): prompts are tokens, P <- g 𝒯(P) + (1 - g) P after each layer 𝒯 but the last, g = σ(a);
    attention is softmax(q kᵀ / (τ sqrt(d))), and τ stays within 0.01 and 10."""
    def f(qkv, p):
        with torch.no_grad():  # in place: outside, a clamp in the graph would leave no gradient to come back
            p.tau.clamp_(0.01, 10)
        q, kv = qkv.tensor_split([qkv.shape[-1] // 3], dim=-1)
        return torch.cat([q / p.tau, kv], dim=-1)
    model = GaPT(vit, num_classes, s)
    model.P, model.a = nn.Parameter(prompts(vit, s.N)), nn.Parameter(torch.full([vit.L - 1], -float(s.gate)))
    for layer in vit.blocks:
        after(layer.attn.qkv, Side(f, tau=torch.ones([])))
    return model
