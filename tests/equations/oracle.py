"""The naive forms: what the paper writes, as slowly and as literally as it writes it.

Prompts are tokens here and stand in the sequence, [z_cls, P, Z]; attention is the full matrix, head by head;
every layer computes all its outputs. Nothing of vit.py or ivpt.py runs, only their parameters are read.
"""

from types import SimpleNamespace

import torch


def close(actual, expected):
    """Equal to rounding, in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---- 3.1 ViT and VPT ------------------------------------------------------------------------------------

def embed(vit, images):
    """[z_cls^0, Z^0]: each patch is cut out and projected by itself; positions are added."""
    p, side = vit.patch_size, vit.img_size // vit.patch_size
    W, b = vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias
    Z = [images[:, :, p * i:p * i + p, p * j:p * j + p].flatten(1) @ W.T + b
         for i in range(side) for j in range(side)]
    z_cls = vit.cls_token[0].expand(len(images), -1)
    return torch.stack([z_cls, *Z], dim=1) + vit.pos_embed


def layer_norm(norm, x):
    """Mean 0 and variance 1 over the width of each token, then gain and bias."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def attention(attn, x, residual=torch.zeros(3)):
    """Multi-head self-attention, head by head: x [B, T, D] -> [B, T, D] and the matrix [B, N_h, T, T].

    A residual [T, 3 D] is added to queries, keys and values."""
    q, k, v = (x @ W.T + b + r for W, b, r in zip(
        attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), residual.chunk(3, dim=-1)))  # [B, T, D]
    d = x.shape[-1] // attn.N_h
    A, heads = [], []
    for h in range(attn.N_h):
        own = slice(h * d, h * d + d)  # the head's part of the width
        e = torch.exp(q[..., own] @ k[..., own].mT / d ** 0.5)  # [B, T, T]
        A.append(e / e.sum(-1, keepdim=True))
        heads.append(A[h] @ v[..., own])
    return torch.cat(heads, dim=-1) @ attn.proj.weight.T + attn.proj.bias, torch.stack(A, dim=1)


def mlp(mlp, x):
    """Two linear maps with GELU in between, x Φ(x) with the normal distribution's Φ."""
    h = x @ mlp.fc1.weight.T + mlp.fc1.bias
    h = h * 0.5 * (1 + torch.erf(h / 2 ** 0.5))
    return h @ mlp.fc2.weight.T + mlp.fc2.bias


def layer(layer, x, norm1=0, qkv=torch.zeros(3), proj=0):
    """𝒯^l of Eq. 1, all tokens: x [B, T, D] -> [B, T, D] and the attention matrix [B, N_h, T, T].

    norm1 [T, D], qkv [T, 3 D] and proj [T, D]: residuals on what these parts put out."""
    attended, A = attention(layer.attn, layer_norm(layer.norm1, x) + norm1, qkv)
    x = x + attended + proj
    return x + mlp(layer.mlp, layer_norm(layer.norm2, x)), A


def read(model, z_cls, Z):
    """What is classified, [B, D]: LayerNorm of the class token [B, 1, D] or of the image tokens' [B, M, D] mean."""
    x = z_cls[:, 0] if model.readout == 'cls' else sum(Z.unbind(1)) / Z.shape[1]
    return layer_norm(model.norm, x)


def vit(model, images):
    """Eq. 1, layer after layer: logits, and the class token's attention to the image tokens, [B, L, M]."""
    x, w = embed(model, images), []
    for block in model.blocks:
        x, A = layer(block, x)
        w.append(A[:, :, 0, 1:].mean(dim=1))
    logits = read(model, x[:, :1], x[:, 1:]) @ model.head.weight.T + model.head.bias
    return logits, torch.stack(w, dim=1)


def eq_3(block, z_cls, P, Z):
    """[z_cls, ..., Z] = 𝒯([z_cls, P, Z]), Eq. 2 and 3: the new z_cls [B, 1, D], the new Z [B, M, D], and
    the class token's row of the attention matrix over z_cls, P and Z, a head each: [B, N_h, 1 + N + M]."""
    N = P.shape[-2]
    x, A = layer(block, torch.cat([z_cls, P.expand(len(Z), -1, -1), Z], dim=1))
    return x[:, :1], x[:, 1 + N:], A[:, :, 0]


# ---- 3.3 CDC and DA -------------------------------------------------------------------------------------

def psi(gamma, P):
    """Eq. 6, the double sum: gamma [N, N], P [N, D] -> [N, D]."""
    rows = []
    for i in range(len(P)):
        rows.append(torch.zeros_like(P[0]))
        for j in range(len(P)):
            rows[i] = rows[i] + gamma[i, j] * P[j]
    return torch.stack(rows)


CONNECTED = {  # P̂^l of P^l, of P^{l-1}, mixed by ψ or not, and of P̂^{l-1}
    'vpt': lambda P, before, P_hat_before: P,
    'vanilla_cdc': lambda P, before, P_hat_before: P + P_hat_before,
    'cdc': lambda P, before, P_hat_before: P + before,
}


def prompts(structure, P, gamma=None):
    """P̂ of Eq. 2 ('vpt'), of vanilla CDC, of Eq. 4 or, with gamma, of Eq. 5, layer by layer."""
    P_hat, connect = [P[0]], CONNECTED[structure]
    for l in range(1, len(P)):
        before = P[l - 1] if gamma is None else psi(gamma[l - 1], P[l - 1])
        P_hat.append(connect(P[l], before, P_hat[l - 1]))
    return P_hat


# ---- 3.5 AR ---------------------------------------------------------------------------------------------

def top_k(w, k):
    """Eq. 14 for each image: the positions of the k largest weights, in descending order."""
    return [sorted(range(len(row)), key=lambda i: -row[i])[:k] for row in w.tolist()]


def reinforce(Z, Omega, P_re):
    """Eq. 15, one token after the other."""
    Z = Z.clone()
    for b, chosen in enumerate(Omega):
        for row, i in enumerate(chosen):
            Z[b, i] = Z[b, i] + P_re[row]
    return Z


def ivpt(model, images):
    """The whole model: its logits, P_hat [L, N, D], the saliency w [B, L, M], the class token's attention to all
    prompts, to_prompts [B, L], and where AR acts Omega, a list of B, L - 1 and k."""
    P_hat = prompts(model.structure, model.P, model.gamma)
    x = embed(model.vit, images)
    z_cls, Z = x[:, :1], x[:, 1:]
    w, to_prompts, Omega = [], [], []
    for l, block in enumerate(model.vit.blocks):
        z_cls, Z, row = eq_3(block, z_cls, P_hat[l], Z)
        w.append(row.mean(dim=1)[:, 1 + model.P.shape[1]:])
        to_prompts.append(row.mean(dim=1)[:, 1:1 + model.P.shape[1]].sum(dim=1))
        if model.P_re is not None and l < len(P_hat) - 1:
            everywhere = [list(range(Z.shape[1]))] * len(Z)
            Omega.append(everywhere if model.reinforcement == 'all' else top_k(w[l], model.k))
            Z = reinforce(Z, Omega[l], model.P_re[l])
    logits = read(model.vit, z_cls, Z) @ model.head.weight.T + model.head.bias
    return SimpleNamespace(logits=logits, P_hat=torch.stack(P_hat), w=torch.stack(w, dim=1),
                           to_prompts=torch.stack(to_prompts, dim=1),
                           Omega=[[chosen[b] for chosen in Omega] for b in range(len(images))])


# ---- Comparing ------------------------------------------------------------------------------------------

def gradients(output, inputs, cotangent):
    """The gradients of the sum of output * cotangent for each input; zeros where it has no part."""
    return torch.autograd.grad((output * cotangent).sum(), list(inputs), materialize_grads=True)


def compare_gradients(ours, literal, inputs, cotangent):
    """Two outputs are equal, and so are their gradients for each input."""
    close([ours, *gradients(ours, inputs, cotangent)], [literal, *gradients(literal, inputs, cotangent)])


def compare(model, images, cotangent):
    """The model's logits, and the gradients of all that it trains, are those of the literal form."""
    trained = [p for p in model.parameters() if p.requires_grad]
    compare_gradients(model(images), ivpt(model, images).logits, trained, cotangent)
