"""
What the study finds about circuits that copy: a function for each question, which makes a Finding
of cells.
"""

import math

import numpy as np

from analysis.statistics import (
    least_squares,
    logrank_p,
    mean,
    paired,
    share,
    survival,
)
from runtime.figures import Figure
from study_cells import (
    ALGORITHMS,
    FORMED,
    MAIN,
    PAIRS,
    STYLES,
    Finding,
    compared,
    compared_shares,
    copies_well,
    emergence,
    is_classical,
    of_shared_seeds,
    spread,
)


def learning(study):
    """When each model learns to copy."""
    finding = Finding('How the models learn to copy', 'circuits')
    figure = Figure(figsize=(12, 4), layout='constrained')
    axes = figure.subplots(1, 3)
    for ax, (key, title) in zip(axes, (('losses', 'val loss, nats'), ('accuracy', 'copy accuracy'),
                                       ('induction', 'attention of the best head to its shift'))):
        for name, colour, line in study.styles():
            for i, cell in enumerate(study.of(name).values()):
                formed = cell['development']
                values = formed['losses'] if key == 'losses' else formed['scores'][key]
                ax.plot(formed['iters'], [math.nan if x is None else x for x in values], line,
                        lw=1.2, color=colour, label=None if i else study.labels[name])
        ax.set(title=title, xlabel='iteration')
        if key != 'losses':
            ax.set_ylim(-0.02, 1.02)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    finding.figure = figure
    finding.rows = [['attention', 'seeds', 'copies, median (lowest to highest)',
                     'val loss, median (lowest to highest)']]
    for name in study.present():
        cells = study.of(name).values()
        finding.rows.append([
            study.labels[name], len(cells),
            spread([cell['circuit']['accuracy'] for cell in cells]),
            spread([cell['development']['losses'][-1] for cell in cells])])
    return finding


def shares_of_circuits(groups):
    """A picture of how often each circuit is the end, from lists of ALGORITHMS by label."""
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(groups)), layout='constrained')
    ax = figure.subplots()
    for place, kinds in enumerate(groups.values()):
        left = 0
        for key, colour in ALGORITHMS.items():
            count = kinds.count(key)
            part = count / len(kinds)
            ax.barh(place, part, left=left, color=colour, edgecolor='white',
                    label=key if place == 0 else None)
            if count:
                ax.text(left + part / 2, place, count, ha='center', va='center', fontsize=8,
                        color='white' if key == 'classical' else 'black')
            left += part
    ax.set_yticks(range(len(groups)), groups, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel='share of the seeds')
    ax.legend(ncols=4, loc='lower center', bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
    return figure


def algorithms(study):
    """Which circuit each attention ends in."""
    finding = Finding('Which circuit copies', 'circuits')
    finding.rows = [['attention', 'seeds', *ALGORITHMS, 'shifts', 'a head above 0.8 (95 %)',
                     'has a duplicate-token head']]
    groups = {}
    for name in study.present():
        circuits = [c['circuit'] for c in study.of(name).values()]
        groups[study.labels[name]] = kinds = [c['algorithm'] for c in circuits]
        shifts = sorted(c['shift'] for c in circuits if c['algorithm'] == 'shifted')
        finding.rows.append([study.labels[name], len(circuits), *map(kinds.count, ALGORITHMS),
                             ', '.join(map(str, shifts)) or '-',
                             share([c['score'] > 0.8 for c in circuits]).text('{:.0%}'),
                             sum(bool(c['duplicates']) for c in circuits)])
        mha, other = study.pairs('mha', name)
        if name not in PARAMETRISED:
            finding.claims += circuit_claims(study.labels[name], 'MHA', other, mha)
            finding.claims += duplicates_claim(study.labels[name], other, mha)
    finding.figure = shares_of_circuits(groups)
    return finding


def duplicates_claim(label, cells, mha):
    """The sentence on how often an attention and MHA have a head that attends to the first
    occurrence itself, in a list."""
    return compared_shares(
        *([bool(c['circuit']['duplicates']) for c in of] for of in (cells, mha)),
        f'{label} has a duplicate-token head more often than MHA',
        f'{label} has a duplicate-token head less often than MHA',
        f'how often {label} has a duplicate-token head less how often MHA does')


def times(study):
    """How long it takes until a head has formed."""
    names = study.present()
    finding = Finding('When induction forms', 'circuits')
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    ax = figure.subplots()
    finding.rows = [['attention', 'seeds', 'formed', 'median iteration (95 %)']]
    groups = {}
    for name in names:
        groups[name] = times_and_ends(study.of(name))
        found = survival(*groups[name])
        for _, colour, line in [style for style in study.styles() if style[0] == name]:
            ax.step([0, *found.times, max(groups[name][1])],
                    [0, *(1 - found.remaining), 1 - found.remaining[-1]], line, where='post',
                    lw=1.8, color=colour,
                    label=f'{study.labels[name]}, {found.n} seed{"s" * (found.n > 1)}')
        ends = [iteration(x) for x in (found.median, found.low, found.high)]
        finding.rows.append([study.labels[name], found.n, found.events,
                             f'{ends[0]} ({ends[1]} to {ends[2]})'])
    ax.set(xlabel='iteration', ylim=(-0.02, 1.02), xlim=(0, None),
           ylabel=f'share of runs with a head above {FORMED}')
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    finding.figure = figure
    for name in names[1:] if names[:1] == ['mha'] else []:
        finding.claims += times_claim(study.labels[name], *groups['mha'], *groups[name])
    return finding


def times_and_ends(cells):
    """Of cells by seed: when a head has formed in each, and how long it was trained."""
    return [emergence(c) for c in cells.values()], [c['max_iters'] for c in cells.values()]


def iteration(n):
    """An iteration as text: nan is one that is not reached."""
    return f'{n:,.0f}' if math.isfinite(n) else 'not reached'


def times_claim(label, mha_times, mha_ends, times, ends, where=''):
    """The sentence on the times until a head has formed in MHA and in another attention, in a
    list: an empty one where there are few runs, or no head has formed."""
    if min(len(mha_times), len(times)) < PAIRS or set(mha_times + times) == {None}:
        return []
    p = logrank_p(mha_times, mha_ends, times, ends)
    seen = 'differ' if p < 0.05 else 'do not differ visibly'
    chance = f'p = {p:.3f}' if p >= 0.001 else 'p < 0.001'
    medians = ' and '.join(iteration(survival(*group).median)
                           for group in ((mha_times, mha_ends), (times, ends)))
    return [f'The times of MHA and {label} until a head is above {FORMED}{where} {seen}: medians '
            f'{medians}, log-rank {chance}, {len(mha_times)} and {len(times)} seeds.']


def half_way(cell, key):
    """The iteration from which a score stays past half the way from its first to its last value:
    what goes up and down before does not count."""
    iters, values = cell['development']['iters'], np.array(cell['development']['scores'][key])
    is_short = (values - (values[0] + values[-1]) / 2) * np.sign(values[-1] - values[0]) < 0
    return iters[min(int(np.flatnonzero(is_short).max(initial=-1)) + 1, len(iters) - 1)]


EVENTS = {'previous': 'the previous-token head', 'k_composition': 'K-composition',
          'rank': 'effective rank of W_Q W_K^T', 'outliers': 'outliers of W_Q W_K^T',
          'keys': 'what keys use', 'values': 'what values use'}


def birth(study):
    """What comes before the induction head, in the runs that end in the classical circuit."""
    finding = Finding('What comes first', 'circuits')
    figure = Figure(figsize=(9, 4.4), layout='constrained')
    ax = figure.subplots()
    finding.rows = [['attention', 'classical runs', *EVENTS.values()]]
    for number, (name, colour, _) in enumerate(study.styles()):
        cells = [c for c in study.of(name).values() if is_classical(c)]
        if len(cells) < PAIRS:
            continue
        row = [study.labels[name], len(cells)]
        for place, (key, event) in enumerate(EVENTS.items()):
            lag = paired([half_way(c, key) for c in cells],
                         [half_way(c, 'induction') for c in cells])
            row.append(lag.text('{:+,.0f}'))
            ax.errorbar(lag.value, place + 0.18 * (number - 1), fmt='osD^'[number], ms=4,
                        xerr=[[lag.value - lag.low], [lag.high - lag.value]],
                        color=colour, label=None if place else study.labels[name])
            if key == 'previous':
                when = {1: 'after', -1: 'before', 0: ''}[lag.sign()]
                said = (f'is half formed {when} the induction head' if when else
                        'forms with the induction head: no difference seen')
                finding.claims.append(
                    f'In {study.labels[name]} the previous-token head {said}: '
                    f'{lag.text("{:+,.0f}")} iterations, {lag.n} runs, checkpoints 100 apart.')
        finding.rows.append(row)
    ax.axvline(0, color='black', lw=0.8)
    ax.set_yticks(range(len(EVENTS)), EVENTS.values(), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel('iterations after the induction head, each half way to its last value')
    ax.grid(alpha=0.3)
    if len(finding.rows) > 1:
        ax.legend(fontsize=8)
        finding.figure = figure
    return finding


def causes(study):
    """Whether the heads that are named are the circuit."""
    finding = Finding('The named heads are the cause', 'circuits')
    finding.rows = [['attention', 'runs', 'copies, median (lowest to highest)',
                     'without the named heads', 'without as many others', 'named, mean']]
    both = []
    for name in study.present():
        circuits = [c['circuit'] for c in study.of(name).values()
                    if c['circuit']['algorithm'] in ('classical', 'shifted')
                    and c['circuit']['without_others'] is not None]
        if not circuits:
            continue
        both += circuits
        finding.rows.append([
            study.labels[name], len(circuits),
            *(spread([c[key] for c in circuits])
              for key in ('accuracy', 'without_named', 'without_others')),
            f'{mean([c["named"] for c in circuits]).value:.1f} of 8'])
    if len(both) >= PAIRS:
        named = mean([c['without_named'] for c in both])
        others = mean([c['without_others'] for c in both])
        whole = mean([c['accuracy'] for c in both])
        finding.claims.append(
            f'Copy accuracy is {whole.text("{:.3f}")} and falls to {named.text("{:.3f}")} without '
            f'the named heads (a guess: {both[0]["chance"]:.3f}). Without as many others of the '
            f'same layers, or all there are, it is {others.text("{:.3f}")}; {whole.n} runs.')
    return finding


def latent(study):
    """How much latent it takes with the recipe."""
    finding = Finding('How small may the latent be', 'least')
    finding.rows = [['attention', 'seeds', 'copies in (95 %)', 'formed in', 'median accuracy']]
    least = {}
    for name in study.present():
        kind = next((kind for kind in ('mla', 'decoupled') if name.startswith(kind)), None)
        width = name.removeprefix(kind or '')
        if not width.isdigit():
            continue
        cells = list(study.of(name).values())
        copies = share([copies_well(c) for c in cells])
        finding.rows.append([study.labels[name], len(cells), copies.text('{:.0%}'),
                             sum(emergence(c) is not None for c in cells),
                             f"{np.median([c['circuit']['accuracy'] for c in cells]):.3f}"])
        if copies.value > 0.5 and len(cells) >= PAIRS:
            least.setdefault(kind, (study.labels[name], len(cells)))
    for kind, (label, n) in least.items():
        finding.claims.append(f'The smallest latent tried with which most runs copy within the '
                              f'iterations is {label}; {n} seeds.')
    return finding


FACTORS = ('number of heads', 'vocabulary', 'width')
# variation: its FACTORS, its learning rate, and its iterations in those of the recipe, which is ''
SIZES = {'': (4, 64, 64, 3e-3, 1), 'heads2': (2, 64, 64, 3e-3, 1), 'heads8': (8, 64, 64, 3e-3, 1),
         'vocabulary16': (4, 16, 64, 3e-3, 1), 'vocabulary256': (4, 256, 64, 3e-3, 1),
         'vocabulary1024': (4, 1024, 64, 3e-3, 1), 'vocabulary1024_long': (4, 1024, 64, 3e-3, 3),
         'narrow': (4, 64, 32, 3e-3, 1), 'narrow_fast': (4, 64, 32, 6e-3, 1),
         'narrow_long': (4, 64, 32, 3e-3, 3),
         'width96': (4, 64, 96, 3e-3, 1), 'width96_slow': (4, 64, 96, 2e-3, 1),
         'wide': (4, 64, 128, 3e-3, 1), 'wide_slow': (4, 64, 128, 1.5e-3, 1)}


LEAST = (4, 8, 12, 16, 24, 32, 48, 64)  # latents that are tried for the least one


def least_latents(study, size):
    """Of each seed of a size with which four of LEAST or more were tried: (the largest latent below
    the least one that copies, that one), or None where all copy or none does."""
    found = {}
    for n in LEAST:
        for seed, cell in study.of(f'mla{n}', size).items():
            found.setdefault(seed, {})[n] = copies_well(cell)
    ends = {}
    for seed, copies in found.items():
        right = min((n for n, well in copies.items() if well), default=math.inf)
        below = max((n for n in copies if n < right), default=0)
        if len(copies) >= 4:
            ends[seed] = (below, right) if 0 < below < right < math.inf else None
    return ends


def law(study):
    """How the least latent depends on heads, vocabulary and width."""
    finding = Finding('What the least latent depends on', 'least')
    finding.rows = [[*FACTORS, 'learning rate', 'iterations', 'seeds', 'least n_latent that copies',
                     'not known', 'MHA copies in']]
    sizes, least, within = [], [], []
    for size, (*shape, rate, _) in SIZES.items():
        ends = least_latents(study, size)
        if not ends:
            continue
        known = [pair for pair in ends.values() if pair]
        spans = sorted({f'{below + 1} to {right}' for below, right in known})
        mha = [copies_well(cell) for cell in study.of('mha', size).values()]
        tried = {n: study.of(f'mla{n}', size).values() for n in LEAST if study.of(f'mla{n}', size)}
        cells = [cell for of in tried.values() for cell in of]
        iterations = max(cell['max_iters'] for cell in cells)
        finding.rows.append([*shape, f'{rate:g}', f'{iterations:,}', len(ends),
                             '; '.join(spans) or '-', len(ends) - len(known),
                             f'{sum(mha)} of {len(mha)}'])
        if min(len(mha), len(ends)) >= PAIRS and all(mha) and not any(map(copies_well, cells)):
            settings = ', '.join(f'{name} {n}' for name, n in zip(FACTORS, shape))
            finding.claims.append(f'With {settings} and learning rate {rate:g} MHA copies within '
                                  f'{iterations:,} iterations, and MLA with n_latent {min(tried)} '
                                  f'to {max(tried)} does not; {len(mha)} and {len(ends)} seeds.')
        sizes += [np.log2(shape)] * len(known)
        least += [math.log2(math.sqrt(below * right)) for below, right in known]
        within += [math.log2(math.sqrt(right / below)) for below, right in known]
    if not sizes:
        return finding
    varied = [i for i, column in enumerate(zip(*sizes)) if len(set(column)) > 1]
    for i in set(range(len(FACTORS))) - set(varied):
        finding.claims.append(f'How the least latent depends on the {FACTORS[i]} is not known: it '
                              f'is known for one alone.')
    if not varied:
        return finding
    try:
        slopes, intercept, left = least_squares(np.array(sizes)[:, varied], np.array(least), within)
    except ValueError:  # too few
        return finding
    for slope, i in zip(slopes, varied):
        finding.claims.append(compared(
            slope, f'The least latent grows with the {FACTORS[i]}, as its power',
            f'The least latent falls with the {FACTORS[i]}, as its power',
            f'the power of the {FACTORS[i]} in the least latent', '{:+.2f}', 'runs'))
    if any(slope.sign() for slope in slopes):
        formula = ' x '.join(f'{FACTORS[i]}^{slope.value:.2f}' for slope, i in zip(slopes, varied))
        finding.claims.append(
            f'The fitted law is n_latent = {2 ** intercept:.2f} x {formula}. Two thirds of the '
            f'runs lie within a factor of {2 ** left:.2f}, {len(least)} runs.')
    else:
        finding.claims.append(f'No law is fitted: no power can be told from 0, {len(least)} runs.')
    return finding


PARAMETRISED = {  # control: what keys are, what values are
    'mha': ('one matrix', 'one matrix'), 'rotated': ('one matrix, other axes',) * 2,
    'keys': ('a product', 'one matrix'), 'values': ('one matrix', 'a product'),
    'separate': ('a product', 'a product'), 'mla64': ('a product', 'one that shares its latent')}


def parametrisation(study):
    """What in MLA makes the circuit classical, by controls that have one thing of it."""
    finding = Finding('What makes MLA classical', 'parametrisation')
    finding.rows = [['attention', 'keys', 'values', 'seeds', 'classical (95 %)', 'shifted',
                     'unnamed', 'none']]
    for name, parts in PARAMETRISED.items():
        cells = list(study.of(name).values())
        if not cells:
            continue
        kinds = [c['circuit']['algorithm'] for c in cells]
        finding.rows.append([
            study.labels[name], *parts, len(cells),
            share([kind == 'classical' for kind in kinds]).text('{:.0%}'),
            kinds.count('shifted'), kinds.count('unnamed'), kinds.count('none')])
        mha, other = study.pairs('mha', name)
        if name != 'mha':
            finding.claims += circuit_claims(study.labels[name], 'MHA', other, mha)
    finding.claims += circuit_claims(study.labels['keys'], study.labels['values'],
                                     *study.pairs('keys', 'values'))
    return finding


def circuit_claims(label, before, cells, others, where=''):
    """The sentences on how often two attentions, of paired cells, end in each circuit."""
    claims = []
    for kind in ('classical', 'shifted'):
        circuit = ('the classical circuit' if kind == 'classical' else 'a shifted one') + where
        claims += compared_shares(
            *([c['circuit']['algorithm'] == kind for c in of] for of in (cells, others)),
            f'{label} ends in {circuit} more often than {before}',
            f'{label} ends in {circuit} less often than {before}',
            f'how often {label} ends in {circuit} less how often {before} does')
    return claims


RECIPES = {'': 'the recipe', 'mlp': 'with MLPs', 'mlp_slow': 'with MLPs, learning rate 1e-3',
           'base10000': 'rotary base 10,000', 'slow': 'learning rate 1e-3',
           'fast': 'learning rate 1e-2', 'wide': '128 wide',
           'wide_slow': '128 wide, learning rate 1.5e-3'}
LATE = [  # (attention, recipe), and those with which it is compared
    (('decoupled16', ''), None), (('decoupled32', ''), None),
    (('decoupled48', ''), ('decoupled16', '')), (('normed48', ''), ('decoupled48', '')),
    (('loud48', ''), ('decoupled48', '')), (('decoupled48', 'slow'), ('decoupled48', '')),
    (('decoupled48', 'wide_slow'), ('decoupled48', '')),
    (('decoupled32', 'slow'), ('decoupled32', '')),
    (('normed32', ''), ('decoupled32', '')),
    (('decoupled16', 'mlp'), ('decoupled16', '')), (('normed16', 'mlp'), ('decoupled16', 'mlp')),
    (('decoupled16', 'mlp_slow'), ('decoupled16', 'mlp'))]


def late(study):
    """What makes the decoupled form late, where its latent is wide and where there are MLPs."""
    finding = Finding('When decoupled MLA is late', 'late')
    finding.rows = [['attention', 'recipe', 'seeds', 'formed', 'median iteration',
                     'copies, median (lowest to highest)']]
    times = {}
    for one, other in LATE:
        cells = study.of(*one)
        if not cells:
            continue
        times[one] = {seed: emergence(c) for seed, c in cells.items()}
        found = survival(*times_and_ends(cells))
        finding.rows.append([
            study.labels[one[0]], RECIPES[one[1]], len(cells), found.events,
            iteration(found.median),
            spread([c['circuit']['accuracy'] for c in cells.values()])])
        if not other:
            continue
        pairs = of_shared_seeds(times[one], times.get(other, {}))
        label, before = (study.labels[name] + f', {RECIPES[recipe]}' * bool(recipe)
                         for name, recipe in (one, other))
        finding.claims += compared_shares(
            *([time is not None for time in of] for of in pairs),
            f'{label} forms induction more often than {before}',
            f'{label} forms induction less often than {before}',
            f'how often {label} forms induction less how often {before} does')
    ends = {True: [], False: []}
    for cell in (cell for (name, recipe), _ in LATE for cell in study.of(name, recipe).values()):
        ends[copies_well(cell)].append(cell['development']['scores']['previous'][-1])
    if all(ends.values()):
        finding.claims.append(
            f'At the end the best previous-token head scores {spread(ends[False], "{:.2f}")} in '
            f'the {len(ends[False])} of these runs that do not copy, and '
            f'{spread(ends[True], "{:.2f}")} in the {len(ends[True])} that do.')
    return finding


def surgery(study):
    """How few directions carry it."""
    finding = Finding('How few directions of what keys and values read are needed', 'circuits')
    names = [name for name in study.labels if study.surgery.get((name, ''))]
    finding.rows = [['attention', 'layer', 'runs', 'directions read', 'found', 'of most variance',
                     'at random', "patched: says the other's token"]]
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes, needs = figure.subplots(1, 2, sharey=True), {}
    for name, (colour, _) in zip(names, STYLES):
        runs = study.surgery[name, '']
        for layer, ax in enumerate(axes):
            found = {seed: run['surgery'] for seed, run in runs.items()}
            # what is not reached counts as one more than was tried
            needs[name, layer] = {seed: {
                key: count or s['counts'][layer][-1] + 1
                for key, count in s['needed'][layer].items()} for seed, s in found.items()}
            cells = needs[name, layer].values()
            finding.rows.append([study.labels[name], layer, len(cells),
                                 next(iter(found.values()))['dimensions'][layer],
                                 *(spread([c[key] for c in cells], '{:.0f}')
                                   for key in ('found', 'variance', 'random')),
                                 spread([s['patched'][layer][1] for s in found.values()
                                         if s['patched'][layer]] or [math.nan])])
            for key, mark in (('variance', '-'), ('random', ':')):
                curves = [[s['accuracy'], *s['left'][layer][key]] for s in found.values()]
                ax.plot([0, *next(iter(found.values()))['counts'][layer]], np.mean(curves, 0), mark,
                        color=colour,
                        label=f'{study.labels[name]}, {key}' if layer == 0 else None)
            ax.set(title=f'layer {layer}', xlabel='directions removed', ylim=(-0.02, 1.02))
            ax.grid(alpha=0.3)
    if not names:
        return finding
    axes[0].set_ylabel('copy accuracy, mean over seeds')
    axes[0].legend(fontsize=8)
    finding.figure = figure
    for name in names:
        for layer in (0, 1):
            own = list(needs[name, layer].values())
            if len(own) >= PAIRS:
                gap = paired([n['random'] for n in own], [n['found'] for n in own])
                finding.claims.append(
                    compared(gap, f'Layer {layer} of {study.labels[name]} copies through few '
                             'directions: random ones needed less found ones',
                             f'In layer {layer} of {study.labels[name]} random directions do as '
                             'much as found ones', f'random less found directions needed in layer '
                             f'{layer} of {study.labels[name]}', '{:+.1f}', 'runs'))
            own, of_mha = of_shared_seeds(needs[name, layer], needs.get(('mha', layer), {}))
            if name != 'mha' and len(own) >= PAIRS:
                gap = paired(*([need['found'] for need in of] for of in (own, of_mha)))
                label = study.labels[name]
                finding.claims.append(compared(
                    gap, f'Layer {layer} of {label} needs more directions than that of MHA',
                    f'Layer {layer} of {label} needs fewer directions than that of MHA',
                    f'directions needed in layer {layer} of {label} less those of MHA', '{:+.1f}'))
            said = {one: {seed: run['surgery']['patched'][layer][1]
                          for seed, run in study.surgery.get((one, ''), {}).items()
                          if run['surgery']['patched'][layer]} for one in (name, 'mha')}
            own, of_mha = of_shared_seeds(said[name], said['mha'])
            if name != 'mha' and len(own) >= PAIRS:
                where = f'in the found directions of layer {layer}, {study.labels[name]}'
                finding.claims.append(compared(
                    paired(own, of_mha),
                    f"Patched {where} says the other prompt's token more often than MHA",
                    f"Patched {where} says the other prompt's token less often than MHA",
                    f"how often, patched {where} says the other prompt's token, less how often "
                    'MHA does', '{:+.0%}'))
    return finding


def controls(study):
    """What copies and is no induction."""
    finding = Finding('Copying is not induction', 'controls')
    finding.rows = [['attention', 'task', 'seeds', 'right on its own task', 'copies at other lags',
                     'best head']]
    for variation, task in (('period', 'one period for all'), ('cycle', 'a cycle each')):
        for name in study.present(variation):
            cells = list(study.of(name, variation).values())
            own, copies, score = (mean(values) for values in zip(*(
                (c['late_accuracy'], c['circuit']['accuracy'], c['circuit']['score'])
                for c in cells)))
            finding.rows.append([study.labels[name], task, len(cells), own.text('{:.3f}'),
                                 copies.text('{:.3f}'), score.text('{:.2f}')])
            finding.claims.append(
                f'{study.labels[name]}, trained on {task}, is right on {own.value:.0%} of it and '
                f'copies {copies.value:.0%} of a stretch at other lags; its best head scores '
                f'{score.value:.2f}; {len(cells)} seed{"s" * (len(cells) > 1)}.')
    return finding


def variations(study):
    """Whether it depends on what else the models have."""
    finding = Finding('Does it depend on the recipe', 'recipe')
    finding.rows = [['recipe', 'attention', 'seeds', 'classical', 'shifted',
                     'copies, median (lowest to highest)', 'formed', 'median iteration']]
    groups, varied = {}, ('mlp', 'base10000', 'slow', 'fast', 'wide', 'wide_slow')
    for variation in ('', *varied) if any(map(study.present, varied)) else ():
        text = RECIPES[variation]
        for name in [name for name in MAIN if study.of(name, variation)]:
            label, cells = study.labels[name], study.of(name, variation)
            circuits = [c['circuit'] for c in cells.values()]
            groups[f'{label}, {text}'] = kinds = [c['algorithm'] for c in circuits]
            found = survival(*times_and_ends(cells))
            finding.rows.append([
                text, label, len(cells), kinds.count('classical'), kinds.count('shifted'),
                spread([c['accuracy'] for c in circuits]), found.events, iteration(found.median)])
            if variation:
                finding.claims += variation_claims(study, name, variation)
    if groups:
        finding.figure = shares_of_circuits(groups)
    return finding


def variation_claims(study, name, variation):
    """The sentences on an attention with another recipe: beside MHA with it, and beside itself."""
    label, text, cells = study.labels[name], RECIPES[variation], study.of(name, variation)
    claims = []
    mha, other = study.pairs('mha', name, variation)
    if name != 'mha':
        claims += circuit_claims(label, 'MHA', other, mha, f' ({text})')
        claims += times_claim(label, *times_and_ends(study.of('mha', variation)),
                              *times_and_ends(cells), f' ({text})')
    varied, same = of_shared_seeds(cells, study.of(name))
    return claims + circuit_claims(f'{label} ({text})', f"{label} ({RECIPES['']})", varied, same)


FINDINGS = (algorithms, variations, parametrisation, times, birth, latent, law, late, surgery,
            causes, controls)
