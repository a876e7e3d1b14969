"""
The weights of a model as maps between tokens, residual stream and heads (Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"). Two models that compute the same function
have the same maps, however their weights divide the work:

    the gain of a layer norm belongs to its readers    ln_1 is folded into W_Q, W_K and W_V,
                                                       ln_f into W_U
    a layer norm subtracts the mean over n_embd        readers and writers are centred
    a constant added to all logits changes nothing     W_U is centred over the vocabulary

Within a head, only the products W_Q W_K^T and W_V W_O have a meaning: W_Q A and W_K A^-T are the
same head. So everything measured here depends only on the products, or on the spaces that they
span. Products of rank head_dim are never multiplied out. Maps act on row vectors, biases are left
out, and everything is float64.

Where positions are rotary, the scores are content plus rotary. W_Q and W_K are the content part:
the same at every distance. With rotary='all' there is no such part, and they are the whole score as
it is at distance 0. rotary_part() is the other part at any distance. A norm on a latent divides
what each token reads by a number of its own, which the maps leave out.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch

from model import rotate


@dataclass
class Heads:
    """The maps of all heads. W_Q, W_K and W_V are (n_layer, n_head, n_embd, head_dim), W_O is
    (n_layer, n_head, head_dim, n_embd)."""
    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor


def part_of_scores(model):
    """A line on what W_Q and W_K of a model say, '' where they say everything."""
    said = {'none': [], 'all': ['W_Q, W_K: scores at distance 0'],
            'decoupled': ['W_Q, W_K: content part of the scores']}[model.config.rotary]
    if getattr(model.config, 'latent_norm', False):
        said.append('without the norms of the latents')
    return ', '.join(said)


@torch.no_grad()
def rotary_part(attention, base, distance):
    """The rotary part of the scores of a query and a key that is distance tokens back, before they
    are scaled, as maps (n_head, n_embd, n_embd): x_query M x_key^T. None where there is none. base
    is the config's rotary_base."""
    maps = attention.rotary_weights()
    if maps is None:
        return None
    Q, K = maps
    return rotate(Q.unsqueeze(2), distance, base).squeeze(2) @ K.mT


def head_names(model):
    """Layer.head of every head, in the order in which the first two dimensions of Heads flatten."""
    c = model.config
    return [f'{layer}.{head}' for layer in range(c.n_layer) for head in range(c.n_head)]


def centred(x, dim=-1):
    return x - x.mean(dim, keepdim=True)


def fold(layer_norm, W):
    """W (..., n_embd, n), which reads the output of a layer norm, as a map of the norm's input
    divided by its standard deviation."""
    return centred(layer_norm.weight.double()[:, None] * W.double(), dim=-2)


@torch.no_grad()
def folded_heads(model):
    """The Heads of a model, with ln_1 folded in and both sides of the residual stream centred."""
    layers = []
    for block in model.transformer.h:
        attn = deepcopy(block.attn).double()  # products in float64 have their exact rank
        *readers, W_O = attn.head_weights()
        layers.append([*(fold(block.ln_1, W) for W in readers), centred(W_O.double())])
    return Heads(*(torch.stack(maps) for maps in zip(*layers)))


@torch.no_grad()
def folded_unembedding(model, n_vocab):
    """W_U (n_embd, n_vocab): ln_f folded in, centred over the n_vocab tokens that mean
    something."""
    return centred(fold(model.transformer.ln_f, model.lm_head.weight[:n_vocab].T))


@torch.no_grad()
def folded_embedding(model, n_vocab):
    """W_E (n_vocab, n_embd): the embeddings less their mean, which every reader subtracts."""
    return centred(model.transformer.wte.weight[:n_vocab].double())


@torch.no_grad()
def token_vectors(model, ids, first_mlp=True):
    """What an attention reads of each of the tokens ids (n,) alone, before the gain of its layer
    norm: the embedding, centred and scaled to variance 1, (n, n_embd). With first_mlp, what the
    first MLP adds to the embedding is included (Wang et al. 2023, section 3.1)."""
    x = model.transformer.wte.weight[ids]
    if first_mlp:
        x = x + model.transformer.h[0].mlp_out(x)
    x = centred(x.double())
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def r_factor(X):
    """R (..., r, r) of the QR factorisation of X (..., n, r). X^T X = R^T R, so R has the lengths
    and angles of X."""
    return torch.linalg.qr(X, mode='r').R


def product_singular_values(A, B):
    """The r singular values of A B, for A (..., n, r) and B (..., r, m), largest first."""
    return torch.linalg.svdvals(r_factor(A) @ r_factor(B.mT).mT)


def orthonormal(X):
    """An orthonormal basis (n, rank) of the space that the columns of X (n, r) span."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[:, S > S.max().clamp_min(1e-300) * max(X.shape) * 1e-9]


def joint_reading_space(heads, layer):
    """An orthonormal basis (n_embd, rank) of what the keys and values of a layer's heads read
    together. For MLA this is what the latent reads. For MHA it is in general the whole residual
    stream."""
    return orthonormal(torch.cat([*heads.W_K[layer], *heads.W_V[layer]], dim=-1))
