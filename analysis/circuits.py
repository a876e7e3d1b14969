"""
The weights of a model as maps between tokens, residual stream and heads, in a form in which two models that compute the
same function have the same maps however their weights share it out (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"):

    the gain of a layer norm belongs to what reads after it    ln_1 is folded into W_Q, W_K, W_V and ln_f into W_U
    a layer norm takes the mean over n_embd away               so it is taken out of what reads and of what writes
    a constant added to all logits changes nothing             so W_U is centred over the vocabulary

Within a head, only the products W_Q W_K^T and W_V W_O have a meaning: W_Q A and W_K A^-T are the same head. All that is
measured here depends on the products, or on the spaces that they span, alone. Products of rank head_dim are never
multiplied out. Maps act on row vectors, biases are left out, and all is float64.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch


@dataclass
class Heads:
    """The maps of all heads, (n_layer, n_head, n_embd, head_dim) each, but W_O (n_layer, n_head, head_dim, n_embd)."""
    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor


def head_names(model):
    """Layer.head of every head, in the order in which the first two dimensions of Heads flatten."""
    return [f'{layer}.{head}' for layer in range(model.config.n_layer) for head in range(model.config.n_head)]


def centred(x, dim=-1):
    return x - x.mean(dim, keepdim=True)


def fold(layer_norm, W):
    """W (..., n_embd, n), which reads what a layer norm puts out, as a map of what comes in, up to that vector's size."""
    return centred(layer_norm.weight.double()[:, None] * W.double(), dim=-2)


@torch.no_grad()
def folded_heads(model):
    """The Heads of a model, ln_1 folded in and both sides of the residual stream centred."""
    layers = []
    for block in model.transformer.h:
        *readers, W_O = deepcopy(block.attn).double().head_weights()  # products in float64, whose rank is then exact
        layers.append([*(fold(block.ln_1, W) for W in readers), centred(W_O.double())])
    return Heads(*(torch.stack(maps) for maps in zip(*layers)))


@torch.no_grad()
def folded_unembedding(model, n_vocab):
    """W_U (n_embd, n_vocab): ln_f folded in, centred over the n_vocab tokens that mean something."""
    return centred(fold(model.transformer.ln_f, model.lm_head.weight[:n_vocab].T))


@torch.no_grad()
def folded_embedding(model, n_vocab):
    """W_E (n_vocab, n_embd): each token's embedding, its mean taken away as every reader does."""
    return centred(model.transformer.wte.weight[:n_vocab].double())


@torch.no_grad()
def token_vectors(model, ids, first_mlp=True):
    """What an attention reads of the tokens ids (n,) each alone, before the gain of its layer norm: the embedding, with
    first_mlp also what the first MLP adds to it (Wang et al. 2023, section 3.1), centred and scaled to variance 1:
    (n, n_embd)."""
    x = model.transformer.wte.weight[ids]
    if first_mlp:
        block = model.transformer.h[0]
        x = x + block.mlp(block.ln_2(x))
    x = centred(x.double())
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def triangle(X):
    """R (..., r, r) with X^T X = R^T R, for X (..., n, r): what X does to lengths, without where it points."""
    return torch.linalg.qr(X, mode='r').R


def product_singular_values(A, B):
    """The r singular values of A B, for A (..., n, r) and B (..., r, m), largest first."""
    return torch.linalg.svdvals(triangle(A) @ triangle(B.mT).mT)


def orthonormal(X):
    """An orthonormal basis (n, rank) of the space that the columns of X (n, r) span."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[:, S > S.max().clamp_min(1e-300) * max(X.shape) * 1e-9]


def joint_reading_space(heads, layer):
    """An orthonormal basis (n_embd, rank) of all that the keys and values of a layer's heads read together. For MLA this is
    what its latent sees; for MHA it is in general the whole residual stream."""
    return orthonormal(torch.cat([*heads.W_K[layer], *heads.W_V[layer]], dim=-1))
