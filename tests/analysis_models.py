"""Models made by hand, whose answers are known, and the same function in other weights."""

from functools import partial

import torch
from conftest import CHARS, tiny_model

from analysis.record import Taps
from analysis.subject import Subject
from model import GPT, GPTConfig
from runtime.factors import convert
from runtime.tokenizer import make_tokenizer

N = 16  # tokens of the vocabulary, positions and numbers in a head of the induction model
TOKEN, POSITION, PREVIOUS, REST = range(0, 16), range(16, 32), range(32, 48), 48


def subject(model):
    """A Subject of a tiny_model."""
    return Subject(model, make_tokenizer(CHARS[:model.config.vocab_size]), '', 'a/model')


def induction_model():
    """Two layers of attention alone. Head 0.0 attends to the previous token and writes which one
    that was. Head 1.0 attends to where the previous token was the current one. All other heads
    attend evenly and write nothing.

    Tokens, positions and previous tokens are unit vectors in parts of the residual stream of their
    own. One more dimension makes every mean 0, so that the layer norms only scale.
    """
    config = GPTConfig(block_size=N, vocab_size=N, n_layer=2, n_head=4, n_embd=64, bias=False)
    model, eye = GPT(config).eval(), torch.eye(N)
    for name, p in model.named_parameters():
        p.data.fill_(1.0 if 'ln_' in name else 0.0)
    wte, wpe = model.transformer.wte.weight.data, model.transformer.wpe.weight.data
    wte[:, TOKEN], wte[:, REST] = eye, -1
    wpe[:, POSITION], wpe[:, REST] = eye, -1
    before, after = (block.attn for block in model.transformer.h)
    W_Q, W_K, W_V = before.c_attn.weight.data.split(64)
    W_Q[:N, POSITION] = 10 * eye.roll(-1, dims=0)  # position i asks for i - 1
    W_K[:N, POSITION] = 10 * eye
    W_V[:N, TOKEN] = eye
    before.c_proj.weight.data[PREVIOUS, :N] = eye
    before.c_proj.weight.data[REST, :N] = -1
    W_Q, W_K, W_V = after.c_attn.weight.data.split(64)
    W_Q[:N, TOKEN] = 10 * eye
    W_K[:N, PREVIOUS] = 10 * eye
    W_K[:N, POSITION[0]] = -10  # the first token has none before it and attends to itself
    return model


def copying_model(shift):
    """Two layers of attention alone that copy by a circuit of a known shift. Head 0.0 attends shift
    tokens back and head 0.1 shift - 1 back; each writes which token that was. Head 1.0 attends to
    where head 0.0 found the current token, and says what head 0.1 found there. All other heads
    attend evenly and write nothing.

    Tokens, positions and the two tokens that are carried are unit vectors in parts of the residual
    stream of their own, as in induction_model.
    """
    n, T = 40, 32  # tokens of the vocabulary; places
    width = 4 * n  # each head holds n tokens
    config = GPTConfig(block_size=T, vocab_size=n, n_layer=2, n_head=4, n_embd=width, bias=False)
    model, rest = GPT(config).eval(), width - 1
    for name, p in model.named_parameters():
        p.data.fill_(1.0 if 'ln_' in name else 0.0)
    token, key, value = range(0, n), range(n + T, 2 * n + T), range(2 * n + T, 3 * n + T)
    wte, wpe = model.transformer.wte.weight.data, model.transformer.wpe.weight.data
    wte[:, token], wte[:, rest] = torch.eye(n), -1
    wpe[:, n:n + T], wpe[:, rest] = torch.eye(T), -1
    first, second = (block.attn for block in model.transformer.h)
    d = config.head_dim
    W_Q, W_K, W_V = first.c_attn.weight.data.split(width)
    for head, (back, to) in enumerate(((shift, key), (shift - 1, value))):
        rows = slice(head * d, head * d + T)
        # place i asks for i - back, and the first ones for the first place
        asks = torch.eye(T)[(torch.arange(T) - back).clamp_min(0)].T
        W_Q[rows, n:n + T], W_K[rows, n:n + T] = 10 * asks, 10 * torch.eye(T)
        W_V[head * d:head * d + n, token] = torch.eye(n)
        first.c_proj.weight.data[to, head * d:head * d + n] = torch.eye(n)
        first.c_proj.weight.data[rest, head * d:head * d + n] = -1
    W_Q, W_K, W_V = second.c_attn.weight.data.split(width)
    W_Q[:n, token], W_K[:n, key], W_V[:n, value] = (torch.eye(n) * scale for scale in (10, 10, 1))
    W_K[:n, n:n + shift] = -10  # the first places have nothing so far back
    second.c_proj.weight.data[token, :n] = 10 * torch.eye(n)
    second.c_proj.weight.data[rest, :n] = -10
    return model


def random_model(model_class, **settings):
    """A tiny_model in which nothing is at its special initial value."""
    model = tiny_model(model_class, **settings)
    for name, p in model.named_parameters():
        if name.endswith('bias') or 'ln_' in name:
            p.data += 0.3 * torch.randn_like(p)
        else:
            p.data += 0.2 * torch.randn_like(p)
    return model


@torch.no_grad()
def same_function(model):
    """A model that computes the same in other weights: ln_1 is scaled against its readers, every
    head and the latent have another basis, and a constant is added to all that is written to the
    residual stream."""
    state, c = {name: p.clone() for name, p in model.state_dict().items()}, model.config
    state['lm_head.weight'] += 0.3
    state['transformer.wte.weight'] = state['lm_head.weight']
    state['transformer.wpe.weight'] += torch.randn(c.block_size, 1)
    d = c.n_embd // c.n_head
    for i, block in enumerate(model.transformer.h):
        # the tensors of state themselves
        own = {name: state[f'transformer.h.{i}.{name}'] for name in block.state_dict()}
        for name in ('attn.c_proj', 'mlp.c_proj'):
            own[f'{name}.weight'] += 0.1 * torch.randn(1, own[f'{name}.weight'].size(1))
            own[f'{name}.bias'] += 0.3
        latent = 'attn.latent_enc.weight' in own
        scale = 0.5 + torch.rand(c.n_embd)
        for name in ('attn.latent_enc', 'attn.query') if latent else ('attn.c_attn',):
            own[f'{name}.weight'] /= scale
        own['ln_1.weight'] *= scale
        own['ln_1.bias'] *= scale
        if latent:
            A = torch.eye(c.n_latent) + 0.2 * torch.randn(c.n_latent, c.n_latent)
            own['attn.latent_enc.weight'].copy_(A @ own['attn.latent_enc.weight'])
            for name in ('attn.key.weight', 'attn.value.weight'):
                own[name].copy_(own[name] @ A.inverse())
        for end in ('weight', 'bias'):
            if latent:
                q, k, v = (own[f'attn.{name}.{end}'] for name in ('query', 'key', 'value'))
            else:
                q, k, v = own[f'attn.c_attn.{end}'].split(c.n_embd)
            torch.manual_seed(i)  # weight and bias change alike
            for h in range(0, c.n_embd, d):
                A, B = (torch.eye(d) + 0.2 * torch.randn(d, d) for _ in range(2))
                for part, change in ((q, A), (k, A.inverse().T), (v, B)):
                    part[h:h + d] = change @ part[h:h + d]
                if end == 'weight':
                    own['attn.c_proj.weight'][:, h:h + d] @= B.inverse()
    return type(model).from_state_dict(c, state).eval()


def exact_mla(model):
    """The GPT_MLA that does the same as a GPT, with a latent as wide as the residual stream."""
    return convert(model, model.config.n_embd)[0]


def edit_z(model, edit):
    """Taps in which the z (B, n_head, T, head_dim) of each layer becomes edit(layer, z)."""
    return Taps({f'blocks.{layer}.attn.z': partial(edit, layer)
                 for layer in range(model.config.n_layer)})
