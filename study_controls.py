"""
Controls of the study. Each computes what a GPT_MLA of the same weights does, so its checkpoint is
one of those.

SeparateLatents has one of the things in which MLA differs from MHA and lacks the others. Its latent
has two halves. Keys read the first and values the second, so they share nothing. A half of n_embd
numbers limits no rank either. Then MLA and MHA differ in how their maps are parametrised alone,
half by half:

    'trained'   W = W_K W_E, of which both learn, as in MLA
    'rotated'   W = W_K W_E, of which W_E stays a random rotation: MHA, in other axes for Adam
    'direct'    W = W_K, as in MHA: W_E stays the identity
"""

from functools import partial

import torch
import torch.nn as nn

from model_mla import GPT_MLA, MultiLatentAttention


class SeparateLatents(MultiLatentAttention):
    kinds = 'trained', 'trained'  # of the halves of keys and of values

    def init_weights(self):
        super().init_weights()
        n, W_E = self.n_latent // 2, self.latent_enc.weight
        with torch.no_grad():  # what is not to be read is 0 and stays 0
            self.key.weight[:, n:] = 0
            self.value.weight[:, :n] = 0
            for half, kind in zip(W_E.split(n), self.kinds):
                if kind == 'trained':
                    nn.init.normal_(half, std=n ** -0.5)
                else:
                    (nn.init.eye_ if kind == 'direct' else nn.init.orthogonal_)(half)
        is_held = torch.tensor([kind != 'trained' for kind in self.kinds]).repeat_interleave(n)
        is_keys = torch.arange(2 * n) < n
        self.is_held, self.drawn = is_held[:, None], W_E.detach().clone()
        for W, learns in ((W_E, ~self.is_held), (self.key.weight, is_keys),
                          (self.value.weight, ~is_keys)):
            W.register_hook(partial(torch.mul, learns))

    def remembered(self, x, start=0):
        with torch.no_grad():  # weight decay has changed it
            self.latent_enc.weight.copy_(
                self.drawn.where(self.is_held, self.latent_enc.weight))
        return super().remembered(x, start)


class LoudRotaryKey(MultiLatentAttention):
    """Starts with a rotary key whose numbers are as large as those of the input, six times what
    they are otherwise."""

    def init_weights(self):
        super().init_weights()
        n_embd = self.latent_enc.in_features
        nn.init.normal_(self.latent_enc.weight[self.n_latent:], std=n_embd ** -0.5)


class GPT_LoudRotaryKey(GPT_MLA):
    attention_class = LoudRotaryKey


def control(keys, values):
    """The model class of a control, from the kinds of the halves that keys and values read."""
    attention = type('SeparateLatents', (SeparateLatents,), {'kinds': (keys, values)})
    return type('GPT_SeparateLatents', (GPT_MLA,), {'attention_class': attention})
