"""
The report of the study: what the cells in a folder say, as one page. Every sentence is made from
the numbers, so another run cannot leave a false one standing. study.py writes it at its end.
"""

import html
from pathlib import Path

from analysis import page
from study_cells import NOTHING, read_study
from study_findings import FINDINGS, learning
from study_text import TEXTS, in_text, ladder

LIMITS = '''Models of two layers with contexts of 32 to 128, on one artificial task and on texts of
one author: nothing here says that larger models do the same. A circuit that forms after the last
iteration counts as not formed. Times are known to 100 iterations. The fewest directions are the
fewest that were found. Intervals are 95 %, one by one: of twenty, one is expected to be wrong.
Several comparisons share the runs of MHA.'''


def render(finding, out_dir, command):
    """The HTML of a finding, whose picture is saved in out_dir too."""
    parts = [f'<h2>{html.escape(finding.title)}</h2>',
             f'<p><code>{html.escape(command)} --question={finding.question}</code></p>']
    # what differs comes first
    for claim in sorted(finding.claims, key=lambda claim: claim.startswith(NOTHING)):
        look = ' class="nothing"' * claim.startswith(NOTHING)
        parts.append(f'<p{look}>{html.escape(claim)}</p>')
    if finding.figure:
        picture = Path(out_dir) / f"{finding.title.lower().replace(' ', '_')}.png"
        finding.figure.savefig(picture, dpi=100)  # the page holds ten of them
        parts.append(page.picture(finding.title, picture, is_wide=True))
    if len(finding.rows) > 1:
        parts.append(page.table(finding.rows))
    return '\n'.join(parts)


def findings_of(study):
    """The Findings that the cells allow, in the order of the page."""
    found = [*(make(study) for make in FINDINGS), *(ladder(study, text) for text in TEXTS),
             in_text(study), learning(study)]
    for finding in found:
        if finding.figure:
            finding.figure.suptitle(finding.title)
    return [finding for finding in found if len(finding.rows) > 1]


def write_report(out_dir, labels, command):
    """Write report.html of the cells in out_dir, and the pictures beside it. Returns the path."""
    study = read_study(out_dir, labels)
    seeds = [len(runs) for runs in study.cells.values()]
    parts = ['<h1>What MLA changes inside</h1>',
             f'<p>{sum(seeds)} models. All of this is made again by <code>{html.escape(command)}'
             '</code>, and each part by the command below its title. Numbers in brackets are 95 % '
             'intervals.</p>']
    for finding in findings_of(study):
        parts.append(render(finding, out_dir, command))
    parts.append(f'<h2>What this does not show</h2><p>{html.escape(LIMITS)}</p>')
    path = Path(out_dir) / 'report.html'
    path.write_text(page.page('What MLA changes inside', '\n'.join(parts)), encoding='utf-8')
    return path
