"""The attentions of the family, as tiny models of two heads of eight."""

import pytest
import torch
from conftest import tiny_model

from model import GPT
from model_mla import GPT_MLA

DEEPSEEK = dict(rotary='decoupled', n_rotary=4, latent_norm=True, latent_scale=True,
                n_query_latent=10)
FAMILY = {
    'mha': (GPT, {}),
    'mqa': (GPT, dict(n_kv_head=1)),
    'gqa': (GPT, dict(n_kv_head=2, n_head=4)),
    'mha, rotary': (GPT, dict(rotary='all', rotary_base=100.0)),
    'gqa, rotary': (GPT, dict(rotary='all', n_kv_head=2, n_head=4, rotary_base=50.0)),
    'mha, attention only': (GPT, dict(mlp=False)),
    'mha, gated': (GPT, dict(mlp='gated', rotary='all')),
    'mla': (GPT_MLA, dict(n_latent=6)),
    'mla, rotary': (GPT_MLA, dict(n_latent=6, rotary='all', rotary_base=100.0)),
    'mla, decoupled': (GPT_MLA, dict(n_latent=6, rotary='decoupled', n_rotary=4)),
    'mla, normed': (GPT_MLA, dict(n_latent=6, latent_norm=True, latent_scale=True)),
    'mla, query latent': (GPT_MLA, dict(n_latent=6, n_query_latent=10)),
    'mla, a latent for each layer': (GPT_MLA, dict(n_latent=(6, 3))),
    'deepseek': (GPT_MLA, dict(n_latent=6, **DEEPSEEK)),
    'deepseek, each layer, attention only': (GPT_MLA, dict(n_latent=(3, 6), mlp=False, **DEEPSEEK)),
}
IS_LINEAR = [name for name in FAMILY if 'deepseek' not in name and 'normed' not in name]
EACH = pytest.mark.parametrize('name', FAMILY)


def member(name, seed=0, **settings):
    """A tiny model of the family in which nothing is at its special initial value."""
    model_class, own = FAMILY[name]
    model = tiny_model(model_class, seed, **own | settings)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model
