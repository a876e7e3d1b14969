"""
The cells of a study, as the report reads them: by attention and seed, with what a finding is and
the sentences that a difference allows.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from analysis.development import first_above
from analysis.statistics import paired_shares
from runtime.figures import Figure

ALGORITHMS = {'classical': '#0072B2', 'shifted': '#E69F00', 'unnamed': '#999999', 'none': '#dddddd'}
STYLES = [('#0072B2', '-'), ('#D55E00', '--'), ('#009E73', '-.'), ('#000000', ':')]  # of curves
MAIN = ['mha', 'mla32', 'decoupled32']  # in curves, recipes and surgery; the tables have all
FORMED = 0.4  # attention of a head at its best shift from which induction has formed
NOTHING = 'No difference seen'
PAIRS = 3  # pairs of seeds from which a difference is spoken of
PAIRS_OF_SHARES = 5  # and one of shares: no test can tell fewer, even where all pairs differ


@dataclass
class Finding:
    """What the page says on one question."""
    title: str
    question: str  # of the study's key question, which trains its cells
    claims: list = field(default_factory=list)  # sentences, each from numbers
    rows: list = field(default_factory=list)  # a table, its headings first
    figure: Figure | None = None


@dataclass
class Study:
    """The cells of a folder."""
    cells: dict  # (attention, variation) -> seed -> what the cell has found
    surgery: dict  # the same of latent_surgery
    labels: dict  # of the attentions, in the order of the page

    def of(self, attention, variation=''):
        return self.cells.get((attention, variation), {})

    def pairs(self, one, other, variation=''):
        """The cells of two attentions with the same seeds, two lists."""
        return of_shared_seeds(self.of(one, variation), self.of(other, variation))

    def present(self, variation=''):
        return [name for name in self.labels if self.of(name, variation)]

    def styles(self):
        """(attention, colour, line) of those whose curves are drawn."""
        names = [name for name in self.present() if name in MAIN] or self.present()
        return [(name, *style) for name, style in zip(names, STYLES)]


def of_shared_seeds(a, b):
    """The values of two dictionaries by seed, of the seeds that both have: two lists."""
    seeds = sorted(a.keys() & b.keys())
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def read_study(out_dir, labels):
    folders = {}
    for kind in ('cells', 'surgery'):
        found = defaultdict(dict)
        for path in sorted((Path(out_dir) / kind).glob('*.json')):
            content = json.loads(path.read_text())
            cell = content['cell']
            found[cell['attention'], cell['variation']][cell['seed']] = content
        folders[kind] = dict(found)
    return Study(folders['cells'], folders['surgery'], labels)


def emergence(cell):
    """The iteration at which a head has formed, None if not by the end."""
    formed = cell['development']
    return first_above(formed['iters'], formed['scores']['induction'], FORMED)


def is_classical(cell):
    return cell['circuit']['algorithm'] == 'classical'


def copies_well(cell):
    return cell['circuit']['algorithm'] != 'none'


def compared(estimate, more, less, same, form='{:+.2f}', of='pairs of seeds'):
    """The sentence that an Estimate of a difference allows, with its numbers. Its interval decides
    which of three it is."""
    sentence = {1: more, -1: less, 0: f'{NOTHING}: {same}'}[estimate.sign()]
    return f'{sentence}: {estimate.text(form)}, {estimate.n} {of}.'


def compared_shares(a, b, more, less, same):
    """The sentence on how often something is true of paired runs, two lists, in a list: an empty
    one where there are few."""
    if len(a) < PAIRS_OF_SHARES:
        return []
    return [compared(paired_shares(a, b), more, less, same, '{:+.0%}')]


def spread(values, form='{:.3f}'):
    """The median of values, and the lowest and highest."""
    middle, low, high = (form.format(f(values)) for f in (np.median, min, max))
    return f'{middle} ({low} to {high})'
