"""
What the study finds about text: a function for each question, which makes a Finding of cells.
"""

from analysis.statistics import mean, paired
from study_cells import PAIRS, Finding, compared

TEXTS = {'characters': 'characters of Shakespeare', 'plays': 'byte pairs of all his plays'}
LADDER = ['mha_learned', 'mla_learned', 'mla32', 'decoupled24', 'norm', 'scale', 'query', 'mla11',
          'mla21', 'mla43', 'mla64', 'decoupled29', 'mqa', 'gqa', 'mha']
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
    finding = Finding(f'The ladder, on {TEXTS[text]}')
    finding.rows = [['attention', 'cached, per token and layer', 'parameters', 'seeds',
                     'bits per byte (95 %)']]
    for name in LADDER:
        cells = [*study.of(name, text).values()]
        if cells:
            finding.rows.append([
                study.labels[name], cells[0]['cached'], f"{cells[0]['parameters']:,}", len(cells),
                mean([c['bits_per_byte'] for c in cells]).text('{:.4f}')])
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
