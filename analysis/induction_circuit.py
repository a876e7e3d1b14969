"""
How a model copies: which heads carry, which heads read, and whether they are the cause.

    python -m analysis.induction_circuit out_study/runs/mha-1/ckpt.pt

It needs a model of two layers or more, and no text. On random tokens of which a stretch comes
twice, at a lag that differs in every sequence:

    copy accuracy   how often the most likely next token is the right one, within the second copy
    reader          a head that attends to a shift s from the first occurrence (induction_heads.py)
    key carrier     a head of an earlier layer that attends s tokens back. It brings the reader's
                    key the token that is matched: K-composition (Elhage et al. 2021)
    value carrier   a head of an earlier layer that attends s - 1 tokens back, which is to itself if
                    s is 1. It brings the reader's value the token to copy: V-composition
    query carrier   a head of an earlier layer that attends to the token itself. It brings the
                    reader's query the token to match: Q-composition
    duplicate       a head that attends to the first occurrence itself, which cannot copy

The algorithm is classical where the best reader has shift 1 and shifted where it has another one.
It is unnamed where the model copies and no head reads, and none where the model does not copy: a
reader alone does not make a circuit. Readers and duplicates count from a mean attention of
threshold, carriers, which share their work, from half of that.

Named heads are then held at their mean over the sequences, all at once, and as many others of the
same layers too. If they are the circuit, copy accuracy falls to chance without them and stays
without the others.
"""

from dataclasses import dataclass
from functools import partial

from configurator import UserError, run

import numpy as np
import torch

from analysis.circuits import folded_heads, part_of_scores
from analysis.composition import chance, compositions, layers
from analysis.induction_heads import batch_size, best_shifts, copies_with_lags, shift_scores
from analysis.plots import Panel, draw_panels, field_maps, with_notes
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import Taps, final_stream, record
from runtime.progress import progress_bar

COPIES = 0.5  # copy accuracy from which a model is said to copy
CONTROLS = 8  # draws of as many other heads


@dataclass
class Config(AnalysisConfig):
    sequences: int = 100  # random sequences
    threshold: float = 0.4  # mean attention from which a head reads; half of it: carries
    least = dict(sequences=1)


@dataclass
class Circuit:
    algorithm: str  # 'classical', 'shifted', 'unnamed' or 'none'
    accuracy: float  # of copying
    chance: float  # accuracy of a guess
    score: float  # of the best reader, at its shift
    shift: int  # of the best reader
    readers: list  # names of heads, as are the next four
    key_carriers: list
    value_carriers: list
    query_carriers: list
    duplicates: list
    k_composition: float  # the largest of a key carrier with a reader, less chance; nan for none
    v_composition: float  # the same of value carriers, and of query carriers
    q_composition: float
    without_named: float  # copy accuracy without readers and carriers; nan where none is named
    without_others: float  # mean accuracy without as many others; nan where there are none
    named: int  # heads that are named
    others: int  # heads in each draw of others: fewer than named where a layer has no more
    alone: np.ndarray  # (n_layer, n_head) copy accuracy without that head; nan where that was not
                       # asked: of a model with more than 64 heads the named ones are
    shifted: np.ndarray  # (n_layer, n_head, shifts) attention to each shift, from 0
    back: np.ndarray  # (n_layer, n_head, shifts) attention to the token so many back
    note: str = ''  # which part of the scores the compositions are about


def copy_accuracy(model, copies, taps=None):
    """How often model is right on the tokens of the second copy but the first, which no one can
    know. taps are record's."""
    idx = copies.idx.to(model.lm_head.weight.device)
    places = copies.queries()[:, :-1]
    rows = torch.arange(len(idx))[:, None]
    right = 0
    for part in torch.arange(len(idx)).split(batch_size(model, idx.size(1))):
        x = final_stream(record(model, idx[part], taps))[rows[:len(part)], places[part]]
        guesses = model.unembed(x).argmax(-1).cpu()  # (B, length - 1)
        right += (guesses == copies.idx[part].gather(1, places[part] + 1)).sum().item()
    return right / places.numel()


def attention_back(model, idx, n):
    """The mean attention (n_layer, n_head, n) to the token 0, 1, ... n - 1 back, over the places of
    idx (B, T) that have so many before them."""
    total = 0
    for part in idx.split(batch_size(model, idx.size(1))):
        patterns = torch.stack([torch.stack(
            [block.pattern().diagonal(-d, -2, -1)[..., n - 1 - d:].mean(-1) for d in range(n)], -1)
            for block in record(model, part)])  # (n_layer, B, n_head, n)
        total = total + patterns.cpu().double().sum(1)
    return (total / len(idx)).numpy()


def names_of(heads):
    return [f'{layer}.{head}' for layer, head in heads]


def mean_outputs(model, idx):
    """The mean output of each head over sequences and places: for each layer (n_head, 1,
    head_dim)."""
    return [block.z.mean((0, 2))[:, None] for block in record(model, idx)]


def without(means, heads):
    """Taps for record that hold heads at their means."""
    def at_means(layer, z):
        z = z.clone()
        for head in [head for at, head in heads if at == layer]:
            z[:, head] = means[layer][head]
        return z
    return Taps({f'blocks.{layer}.attn.z': partial(at_means, layer) for layer, _ in heads})


def draw_others(named, c, seed):
    """As many heads of each layer as are named there, drawn from the others; fewer where there are
    no more."""
    rng, drawn = np.random.default_rng(seed), []
    for layer in range(c.n_layer):
        others = [(layer, head) for head in range(c.n_head) if (layer, head) not in named]
        count = min(c.n_head - len(others), len(others))
        drawn += [others[i] for i in rng.permutation(len(others))[:count]]
    return drawn


def largest_composition(model, kind, carriers, readers):
    """The largest composition of a carrier with a reader, less chance; nan where there is none."""
    c = model.config
    folded, found = folded_heads(model), []
    for layer in {layer for layer, _ in readers}:
        scores = compositions(layers(folded, slice(layer)), layers(folded, slice(layer, layer + 1)))
        found += [scores[kind][at * c.n_head + head, reader] for at, head in carriers if at < layer
                  for own, reader in readers if own == layer]
    if not found:
        return np.nan
    means, _ = chance(c.n_embd, c.head_dim, 100, 0)
    return float(max(found)) - means[kind]


def analyse(subject, config):
    model, c = subject.model, subject.model.config
    if c.n_layer < 2:
        raise UserError('a circuit that copies has heads in two layers, and n_layer=1: take a '
                        'model with more')
    if c.block_size < 4:
        raise UserError(f'block_size={c.block_size} has no room for two copies of two tokens: take '
                        'a model with 4 or more')
    copies = copies_with_lags(model, subject.n_vocab, config.sequences, config.seed)
    idx = copies.idx.to(subject.device)
    shifted = shift_scores(subject, copies)
    back = attention_back(model, idx, copies.n_shifts)
    accuracy = copy_accuracy(model, copies)

    # a head reads at the shift that it attends to most
    at, best = best_shifts(shifted)
    readers = [head for head in top_heads(best, threshold=config.threshold) if head[0] > 0]
    leader = readers[0] if readers else top_heads(best[1:], 1)[0]
    leader = leader if readers else (leader[0] + 1, leader[1])
    shift = int(at[leader])
    readers = [head for head in readers if at[head] == shift]
    top = max([layer for layer, _ in readers], default=0)
    carriers = {kind: top_heads(back[:top, :, distance], threshold=config.threshold / 2)
                for kind, distance in (('k', shift), ('v', shift - 1), ('q', 0))}
    algorithm = 'none'
    if accuracy >= COPIES:
        algorithm = ('classical' if shift == 1 else 'shifted') if readers else 'unnamed'

    named = [*dict.fromkeys(sum(carriers.values(), readers))]
    means = mean_outputs(model, idx)
    draws = [draw_others(named, c, seed) for seed in range(CONTROLS)]
    n_others = len(draws[0])
    left = [copy_accuracy(model, copies, without(means, draw)) for draw in draws]
    alone = np.full((c.n_layer, c.n_head), np.nan)
    asked = list(np.ndindex(alone.shape)) if alone.size <= 64 else named
    for head in progress_bar(asked, 'without a head'):
        alone[head] = copy_accuracy(model, copies, without(means, [head]))
    return Circuit(
        algorithm, accuracy, 1 / subject.n_vocab, float(best[leader]), shift, names_of(readers),
        *map(names_of, carriers.values()),
        names_of(top_heads(shifted[..., 0], threshold=config.threshold)),
        *(largest_composition(model, kind, heads, readers) for kind, heads in carriers.items()),
        copy_accuracy(model, copies, without(means, named)) if named else np.nan,
        float(np.mean(left)) if n_others else np.nan, len(named), n_others,
        alone, shifted, back, part_of_scores(model))


def table(result):
    def listed(names):
        return ' '.join(names) or 'none'

    def part(value):
        return 'unknown' if np.isnan(value) else f'{value:.3f}'
    named = {'classical': 'classical (shift 1)', 'shifted': f'shifted by {result.shift}'}
    lines = [('algorithm', named.get(result.algorithm, result.algorithm)),
             ('copy accuracy', f'{result.accuracy:.3f}      chance {result.chance:.3f}'),
             ('best reader', f'{result.score:.3f} at shift {result.shift}'),
             ('readers', listed(result.readers)),
             *((f'{name} carriers', f'{listed(heads)}      {name[0].upper()}-composition less '
                f'chance {part(composition)}') for name, heads, composition in (
                 ('key', result.key_carriers, result.k_composition),
                 ('value', result.value_carriers, result.v_composition),
                 ('query', result.query_carriers, result.q_composition))),
             ('duplicates', listed(result.duplicates)),
             ('without these', f'copy accuracy {part(result.without_named)}      '
                               f'{result.named} heads'),
             ('without others', f'copy accuracy {part(result.without_others)}      '
                                f'{result.others} heads of the same layers at a time')]
    text = '\n'.join(f'{name:<18}{value}' for name, value in lines)
    return text + f'\n{result.note}' * bool(result.note)


def plot(results):
    panels = []
    for title, field, unit in (('attention to the first occurrence and what follows', 'shifted',
                                'shift'), ('attention back', 'back', 'tokens back')):
        maps, names = {}, {}
        for name, result in results.items():
            values = getattr(result, field)  # (n_layer, n_head, shifts)
            maps[name] = values.reshape(-1, values.shape[-1])
            heads = names_of(np.ndindex(values.shape[:2]))
            names[name] = heads, [str(shift) for shift in range(values.shape[-1])]
        panels.append(Panel(title, maps, 'mean attention', 0, 1, 'Blues', 'head', unit,
                            names=names))
    panels.append(Panel('copy accuracy without a head', field_maps(results, 'alone'),
                        'copy accuracy', 0, 1))
    found = ', '.join(f'{name}: {r.algorithm}, copies {r.accuracy:.0%}'
                      for name, r in results.items())
    return draw_panels(with_notes(f'The circuit that copies ({found})', results), panels)


if __name__ == '__main__':
    run(lambda: main('induction_circuit', Config, analyse, table, plot))
