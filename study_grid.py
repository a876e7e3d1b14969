"""
What the study trains: attentions, what else can differ from the recipe, and the cells of each
question. A cell is one model: an attention, a seed and a variation.
"""

from dataclasses import dataclass

from model import GPT
from model_mla import GPT_MLA
from study_cells import MAIN
from study_controls import GPT_LoudRotaryKey, control
from study_findings import SIZES
from study_text import LADDER, READING, RUNGS

RECIPE = 'config/train_induction.py'


@dataclass(frozen=True)
class Attention:
    label: str
    model_class: type = GPT
    settings: tuple = ()  # pairs of a key of the model and its value


def mla(label, n_latent, model_class=GPT_MLA, **settings):
    return Attention(label, model_class, (('n_latent', n_latent), *settings.items()))


DECOUPLED = dict(rotary='decoupled', n_rotary=8)
ATTENTIONS = {
    'mha': Attention('MHA'),
    'gqa': Attention('GQA, 2 heads', settings=(('n_kv_head', 2),)),
    'mqa': Attention('MQA', settings=(('n_kv_head', 1),)),
    # 11, 21 and 43 have the parameters of MQA, GQA and MHA
    **{f'mla{n}': mla(f'MLA {n}', n) for n in (2, 4, 8, 11, 12, 16, 21, 24, 32, 43, 48, 64)},
    **{f'decoupled{n}': mla(f'MLA {n} decoupled', n, **DECOUPLED) for n in (16, 29, 32, 48)},
    # which part of the parametrisation matters
    'separate': mla('MLA 32 + 32 separate', 64, control('trained', 'trained')),
    'keys': mla('MHA, keys as in MLA 64', 128, control('trained', 'direct')),
    'values': mla('MHA, values as in MLA 64', 128, control('direct', 'trained')),
    'rotated': mla('MHA in other axes', 128, control('rotated', 'rotated')),
    # rungs from MLA to DeepSeek's, of one cache: latent and rotary key are 32 numbers
    'decoupled24': mla('MLA 24 decoupled', 24, **DECOUPLED),
    'norm': mla('MLA 24 decoupled, norm', 24, latent_norm=True, **DECOUPLED),
    'scale': mla('MLA 24 decoupled, norm, scale', 24, latent_norm=True, latent_scale=True,
                 **DECOUPLED),
    'query': mla('MLA 24 decoupled, norm, scale, query latent', 24, latent_norm=True,
                 latent_scale=True, n_query_latent=32, **DECOUPLED),
    # what makes a wide decoupled latent late
    **{f'normed{n}': mla(f'MLA {n} decoupled, norm', n, latent_norm=True, **DECOUPLED)
       for n in (16, 32, 48)},
    'loud48': mla('MLA 48 decoupled, large rotary key', 48, GPT_LoudRotaryKey, **DECOUPLED),
    'mha_learned': Attention('MHA, learned positions', settings=(('rotary', 'none'),)),
    'mla_learned': mla('MLA 32, learned positions', 32, rotary='none'),
}


@dataclass(frozen=True)
class Cell:
    """One model of the study."""
    attention: str
    seed: int
    variation: str = ''  # of VARIATIONS

    @property
    def name(self):
        return '-'.join(filter(None, (self.attention, self.variation, str(self.seed))))

    def iterations(self, max_iters):
        return VARIATIONS[self.variation].get('times', 1) * max_iters

    def arguments(self):
        """The command line of the trainer."""
        settings = dict(ATTENTIONS[self.attention].settings) | VARIATIONS[self.variation]
        return [RECIPE, *(f'--{key}={value}' for key, value in settings.items()
                          if key not in NOT_THE_TRAINERS), f'--seed={self.seed}']


# What is not as the recipe has it. task and vocabulary are those of data/induction/prepare.py.
# times is of max_iters.
NOT_THE_TRAINERS = ('task', 'vocabulary', 'dataset', 'times')
TEXT = dict(mlp=True, block_size=64, batch_size=12, learning_rate=1e-3, lr_schedule='cosine',
            lr_decay_iters=3000, min_lr=1e-4)
VARIATIONS = {
    '': {},
    'mlp': dict(mlp=True),
    'base10000': dict(rotary_base=10000.0),
    'mlp_slow': dict(mlp=True, learning_rate=1e-3),
    'slow': dict(learning_rate=1e-3),
    'fast': dict(learning_rate=1e-2),
    **{name: dict(n_head=heads, vocabulary=vocabulary, n_embd=width, learning_rate=rate,
                  times=times)
       for name, (heads, vocabulary, width, rate, times) in SIZES.items() if name},
    'period': dict(task='period'),
    'cycle': dict(task='cycle'),
    'characters': dict(dataset='shakespeare_char', **TEXT),
    'plays': dict(dataset='plays', **TEXT),
    # past T sqrt(B C) tokens, T = 10^5.7, from which induction is said to emerge
    READING: dict(dataset='plays', mlp=True, block_size=128, batch_size=16, eval_interval=500,
                  lr_schedule='cosine', lr_decay_iters=12_000, min_lr=3e-4, times=4),
}


def grid(attentions, seeds, variations=('',)):
    """Cells, seed by seed: what is stopped early has as many seeds of each."""
    return [Cell(attention, seed, variation) for seed in seeds for variation in variations
            for attention in attentions]


OTHERS = ['mla16', 'mla48', 'mla64', 'decoupled16', 'decoupled48']
LEARNED = ['mha_learned', 'mla_learned']
LATENTS = ['mha', 'mla8', 'mla12', 'mla16', 'mla24']  # among which the least latent is looked for
# sizes with which MLA copies, and those with which it does not in as many iterations
COPIED = ['heads2', 'heads8', 'vocabulary256', 'vocabulary1024_long', 'narrow_long']
WIDER = ['width96_slow', 'wide_slow']
MISSED = ['vocabulary1024', 'narrow', 'narrow_fast', 'width96', 'wide']
QUESTIONS = {
    # which circuit, when, what first, through how many directions, and whether it is the cause
    'circuits': [*grid(MAIN + OTHERS, range(1, 21)), *grid(['gqa'], range(1, 6)),
                 *grid(LEARNED, range(1, 4))],
    'parametrisation': [*grid(['mha', 'rotated', 'mla64'], range(1, 21)),
                        *grid(['keys', 'values', 'separate'], range(1, 11))],
    'least': [*grid(['mla2', 'mla4', 'mla8'], range(1, 4)), *grid(['mla12', 'mla24'], [1, 2]),
              *grid(LATENTS, [1, 2], COPIED),
              *grid(LATENTS, [1], [*WIDER, *MISSED, 'vocabulary16']),
              *grid(LATENTS[1:], [2], ['width96', 'vocabulary1024']),
              *grid(['mla4'], [1], ['wide_slow']), *grid(['mla8'], [2], ['wide_slow']),
              *grid(['mla32'], [1], [*MISSED, 'narrow_long', 'wide_slow']),
              *grid(['mla48'], [1], ['width96', 'wide', 'wide_slow', 'vocabulary1024'])],
    'late': [*grid(['decoupled16', 'decoupled32', 'decoupled48'], range(1, 21)),
             *grid(['normed32', 'normed48'], range(1, 21)), *grid(['loud48'], range(1, 9)),
             *grid(['decoupled48'], range(1, 6), ['slow', 'wide_slow']),
             *grid(['decoupled32'], range(1, 21), ['slow']),
             *grid(['decoupled16'], range(1, 11), ['mlp', 'mlp_slow']),
             *grid(['normed16'], range(1, 6), ['mlp'])],
    'recipe': [*grid(MAIN, range(1, 11), ['mlp', 'slow']),
               *grid(['mha', 'mla32'], range(1, 11), ['base10000', 'wide_slow']),
               *grid(['mha', 'mla32'], range(1, 6), ['fast'])],
    'controls': grid(['mha_learned', 'mha'], range(1, 4), ['period', 'cycle']),
    'ladder': [*grid(LADDER, range(1, 4), ['characters']), *grid(RUNGS, [4, 5], ['characters']),
               *grid(RUNGS, range(1, 4), ['plays'])],
    'reading': grid(['mha', 'mla32'], range(1, 4), [READING]),
}
PRESETS = {
    'minute': grid(['mha', 'decoupled32'], [1]),
    'evening': [*grid(MAIN, range(1, 11)), *grid(['gqa', *OTHERS, 'separate'], range(1, 6)),
                *grid(LEARNED, [1, 2]), *grid(['mla2', 'mla4', 'mla8'], range(1, 4)),
                *grid(['mha_learned', 'mha'], [1], ['period', 'cycle'])],
}
PRESETS['night'] = [*dict.fromkeys([*PRESETS['evening'], *sum(QUESTIONS.values(), [])])]
