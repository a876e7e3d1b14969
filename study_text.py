"""
What the study finds about text: a function for each question, which makes a Finding of cells.
"""

import numpy as np

from analysis.statistics import mean, paired
from runtime.figures import Figure
from study_cells import FORMED, PAIRS, STYLES, Finding, compared, of_shared_seeds, spread

TEXTS = {'characters': 'characters of Shakespeare', 'plays': 'byte pairs of all his plays'}
READING = 'reading'  # the variation that reads a text for long
LADDER = ['mha_learned', 'mla_learned', 'mla32', 'decoupled24', 'norm', 'scale', 'query', 'mla11',
          'mla21', 'mla43', 'mla64', 'decoupled29', 'mqa', 'gqa', 'mha']
RUNGS = ['mha_learned', 'mla_learned', 'mla32', 'decoupled24', 'mqa', 'mla43', 'mha']  # the main
# what is compared: (before, after, of what, the published sign of the change where there is one)
MARIN = 'Marin, issue 7423'
STEPS = [
    ('mha', 'mha_learned', 'no rotary positions', (1, MARIN)),
    ('mha_learned', 'mla_learned', 'a latent, without rotary positions', (1, MARIN)),
    ('mha', 'mla32', 'a latent, with rotary keys', None),
    ('mla_learned', 'mla32', 'rotary keys', None),
    ('mla_learned', 'decoupled24', 'a decoupled rotary key', (-1, MARIN)),
    ('mla32', 'decoupled24', 'the rotary key decoupled, at equal cache', None),
    ('decoupled24', 'norm', 'a norm of the latent', None),
    ('norm', 'scale', 'a scale of the latent', None),
    ('scale', 'query', 'a latent of queries', (-1, MARIN)),
    ('mqa', 'mla32', 'at equal cache', (-1, 'MLS-Bench')),
    ('mqa', 'decoupled24', 'at equal cache', (-1, 'MLS-Bench')),
    ('gqa', 'mla64', 'at equal cache', None),
    ('mha', 'mla43', 'at equal parameters', None),
    ('mha', 'decoupled29', 'at equal parameters', (-1, 'DeepSeek-V2, issue 26')),
    ('gqa', 'mla21', 'at equal parameters', None),
    ('mqa', 'mla11', 'at equal parameters', None)]


def ladder(study, text):
    """What each step from MLA to DeepSeek's gives on a text, and what a cache or a number of
    parameters is best spent on."""
    finding = Finding(f'The ladder, on {TEXTS[text]}', 'ladder')
    finding.rows = [['attention', 'cached, per token and layer', 'parameters', 'seeds',
                     'bits per byte (95 %)']]
    bits = {}
    for name in LADDER:
        cells = [*study.of(name, text).values()]
        if cells:
            cached, found = cells[0]['cached'], mean([c['bits_per_byte'] for c in cells])
            bits[f'{study.labels[name]}  ({cached})'] = found
            finding.rows.append([study.labels[name], cached, f"{cells[0]['parameters']:,}",
                                 len(cells), found.text('{:.4f}')])
    finding.figure = bits_of_each(bits)
    for before, after, what, published in STEPS:
        a, b = study.pairs(after, before, text)
        if len(a) < PAIRS:
            continue
        change = paired(*([c['bits_per_byte'] for c in cells] for cells in (a, b)))
        label, other = study.labels[after], study.labels[before]
        claim = compared(change, f'{label} needs more bits than {other} ({what})',
                         f'{label} needs fewer bits than {other} ({what})',
                         f'bits of {label} less those of {other} ({what})', '{:+.4f}')
        if published:
            sign, source = published
            found = {sign: 'It comes out here', -sign: 'The opposite comes out here',
                     0: 'It cannot be told here'}[change.sign()]
            claim += f" Published ({source}): {'more' if sign > 0 else 'fewer'}. {found}."
        finding.claims.append(claim)
    return finding


def bits_of_each(bits):
    """A picture of Estimates of bits per byte by label."""
    figure = Figure(figsize=(8, 0.9 + 0.3 * len(bits)), layout='constrained')
    ax = figure.subplots()
    for place, found in enumerate(bits.values()):
        # the interval of one run is not known
        ends = [found.value - found.low, found.high - found.value] if found.n > 1 else [0, 0]
        ax.errorbar(found.value, place, xerr=[[end] for end in ends], fmt='o', ms=5, capsize=3,
                    color='#0072B2')
    ax.set_yticks(range(len(bits)), bits, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel('bits per byte, mean and 95 % interval over seeds\n'
                  'in brackets: numbers cached per token and layer')
    ax.grid(alpha=0.3)
    return figure


def best_in_text(cell):
    """Of the head behind the first layer that attends most in a text to what followed the same
    token, beyond what places give: how much that is, its best score on random tokens, and how much
    more a repeat loses without it than the same token from elsewhere."""
    found = {key: np.array(cell['in_text'][key], dtype=float)[1:]
             for key in ('attention', 'expected', 'random', 'alone')}
    excess = found['attention'] - found['expected']
    at = np.unravel_index(excess.argmax(), excess.shape)
    return excess[at], found['random'].max(), found['alone'][at]


def formed_in_text(study):
    """A picture of the best head on random tokens while a text is read, of each run."""
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    ax = figure.subplots()
    for name, (colour, line) in zip(study.present(READING), STYLES):
        for i, cell in enumerate(study.of(name, READING).values()):
            formed = cell['development']
            ax.plot(formed['iters'], formed['scores']['induction'], line, lw=1.4, color=colour,
                    label=None if i else study.labels[name])
    ax.axhline(FORMED, color='black', lw=0.8, ls=':', label='from here on it has formed')
    ax.set(xlabel='iteration', ylabel='attention of the best head to its shift', ylim=(-0.02, 1.02))
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return figure


def in_text(study):
    """Whether induction heads form in a text, and what they do there."""
    finding = Finding('Induction in a text', 'reading')
    finding.rows = [['attention', 'seeds', 'bits per byte (95 %)', 'best head on random tokens',
                     'attention in the text beyond places', 'difference without that head, nats']]
    excess, finding.figure = {}, formed_in_text(study)
    for name in study.present(READING):
        cells = study.of(name, READING)
        found = {seed: best_in_text(cell) for seed, cell in cells.items()}
        excess[name] = {seed: beyond for seed, (beyond, *_) in found.items()}
        label, n = study.labels[name], len(cells)
        beyond, random, without = zip(*found.values())
        finding.rows.append([label, n, mean([c['bits_per_byte'] for c in cells.values()]
                                            ).text('{:.4f}'),
                             spread(random), spread(beyond), spread(without, '{:+.3f}')])
        formed = sum(score >= FORMED for score in random)
        finding.claims.append(f'On random tokens {label} has a head above {FORMED} in {formed} of '
                              f'{n} runs; the best head scores {spread(random)}.')
        if n >= PAIRS:
            finding.claims.append(compared(
                mean(beyond), f'In the text the best head of {label} attends to what followed the '
                'same token more than its mean pattern does', f'In the text no head of {label} '
                'attends to what followed the same token', 'attention of the best head of '
                f'{label} to what followed the same token in the text, less that of its mean '
                'pattern', '{:+.3f}', 'runs'))
            finding.claims.append(compared(
                mean(without), f'Repeats need that head of {label}: without it they lose more than '
                'the same tokens from elsewhere', f'Repeats do not need that head of {label}: '
                'without it they lose less than the same tokens from elsewhere',
                f'what repeats lose without that head of {label} less what the same tokens from '
                'elsewhere lose', '{:+.3f} nats', 'runs'))
        own, of_mha = of_shared_seeds(excess[name], excess.get('mha', {}))
        if name != 'mha' and len(own) >= PAIRS:
            finding.claims.append(compared(
                paired(own, of_mha),
                f'{label} attends more to what followed the same token in the text than MHA',
                f'{label} attends less to what followed the same token in the text than MHA',
                f'attention of {label} to what followed the same token in the text less that of '
                'MHA', '{:+.3f}'))
    return finding
