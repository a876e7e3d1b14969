"""
All of it for an MHA and an MLA model side by side, in one file: report.html.

    python -m analysis.report out_shakespeare_quick/ckpt.pt out_shakespeare_quick/ckpt_mla.pt

It needs two models. An analysis that cannot serve one of them is left out, and the report says
why. The pictures and numbers of each analysis lie beside report.html, in a folder of this pair:
out_report/out_shakespeare_quick/ckpt.pt-vs-ckpt_mla.pt.
"""

import base64
import html
import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

from configurator import UserError, run

from analysis import program
from models import describe
from runtime.loading import find_checkpoint, is_hugging_face
from runtime.progress import progress_bar

PARTS = {
    'induction_heads': 'The prefix-matching score is the mean attention, over the second copy of '
        'repeated random tokens, to the token that followed the same token in the first copy: 1 is '
        'a perfect induction head.',
    'induction_circuit': 'Where heads look when a stretch of random tokens comes twice, at lags '
        'that differ: at the first occurrence (0), at what followed it (1: classical induction) or '
        'further (shifted); how far back they look; and how much is copied without each head.',
    'attention_patterns': 'Mean attention to the previous, the current and the first token and to '
        'the last occurrence of the same one, and the entropy of attention as a share of that of '
        'even attention, over repeated random tokens.',
    'copying': 'Eigenvalues of the full OV circuit (1: reading a token raises its own logit, -1: '
        'lowers it), and how often a head alone puts a token that it reads among the five '
        'likeliest, or the five unlikeliest.',
    'composition': 'How much of what a head writes is read by the query, key and value side of '
        'each later head, less what random matrices of the same shape give.',
    'ioi': 'After "When Mary and John walked to the store, John gave a drink to": logit of Mary '
        'less that of John, what each head adds to it directly, and how much of it comes back when '
        'one head is patched into a prompt with other names.',
    'subspaces': 'Overlap (mean squared cosine of the principal angles) of the spaces that heads '
        'write to and read their keys and values from: 1 is the same space.',
    'latent_directions': 'Directions of the residual stream in the order in which attention reacts '
        'to them through the latent, and the part that keys have in each direction of the latent: '
        '1 is used by keys alone, 0 by values alone.',
    'spectrum': 'Singular values of W_Q W_K^T and W_V W_O of every head, in the weights and over a '
        'text; effective rank; and how many lie beyond the edge of noise.',
    'ablation': 'How much the loss, and the difference between the loss late and early in the '
        'context, change with each head at zero or at its mean.',
    'induction_in_text': 'Attention in a text to what followed the same token before, beside what '
        'places alone give; and how much more is lost without a head where induction is right than '
        'where the next token came before elsewhere.',
    'similarity': 'CKA of the residual streams of the two models on the same text, after the '
        'embedding (0) and each block, and of what their heads write: 1 is the same up to rotation '
        'and scale.',
}
PAGE = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em; \
line-height: 1.45; }}
pre {{ background: #f5f5f5; padding: 0.8em; overflow-x: auto; font-size: 0.8em; \
flex: 1 1 30em; margin: 0.3em; }}
.tables {{ display: flex; flex-wrap: wrap; }} img {{ max-width: 100%; }} \
.left-out {{ color: #a04000; }}
</style></head><body>
{body}
</body></html>
'''


@dataclass
class Config(program.AnalysisConfig):
    model: str = ''  # the MHA model: a checkpoint, an out_dir, a Hugging Face directory, or gpt2
    other: str = ''  # the MLA model, or another one
    out_dir: str = ''  # where report.html goes, and picture and numbers of each part; '':
        # in out_report/, a folder for each pair
    text: str = ''  # for the parts that read one: FILE:book.txt or a dataset; '': the val split
        # that each checkpoint names


def run_part(name, subjects, config):
    """The module of one analysis, its results by the names of the models, and a line for each
    model that it could not serve."""
    module, results, left_out = import_module(f'analysis.{name}'), {}, []
    if name == 'similarity':
        jobs = {' and '.join(subjects): (module.compare, *subjects.values())}
    else:
        jobs = {label: (module.analyse, subject) for label, subject in subjects.items()}
    for label, (analyse, *models) in jobs.items():
        try:
            results[label] = analyse(*models, program.settings(module, config, models[0].source))
        except UserError as e:
            left_out.append(f'{label}: {e}')
    return module, results, left_out


def section(name, module, results, left_out, out_dir):
    """The HTML of one part."""
    parts = [f'<h2 id="{name}">{name.replace("_", " ")}</h2>', f'<p>{html.escape(PARTS[name])}</p>']
    for line in left_out:
        parts.append(f'<p class="left-out">Left out for {html.escape(line)}</p>')
    if results:
        picture = base64.b64encode((out_dir / f'{name}.png').read_bytes()).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{picture}">')
        tables = [f'<pre><b>{html.escape(label)}</b>\n\n{html.escape(module.table(result))}</pre>'
                  for label, result in results.items()]
        parts.append(f'<div class="tables">{"".join(tables)}</div>')
    return '\n'.join(parts)


def heading(subjects):
    """The HTML before the parts: a title, the models and links."""
    parts = ['<h1>MHA and MLA taken apart</h1>', '<ul>']
    for label, subject in subjects.items():
        source, model = html.escape(subject.source), html.escape(describe(subject.model))
        parts.append(f'<li><b>{html.escape(label)}</b>: {source}, {model}</li>')
    links = ' '.join(f'<a href="#{name}">{name.replace("_", " ")}</a>' for name in PARTS)
    return '\n'.join([*parts, '</ul>', f'<p>{links}</p>'])


def same_model(source, other):
    """Whether two sources lead to the same weights."""
    if is_hugging_face(source) or is_hugging_face(other):
        return source == other
    return find_checkpoint(source).resolve() == find_checkpoint(other).resolve()


def pair_folder(source, other):
    """The folder in out_report for two models: what their paths begin with, then the rest of both,
    as in out_report/runs/ckpt.pt-vs-ckpt_mla.pt. No two pairs have the same."""
    paths = []
    for path in (source, other):
        path = Path(os.path.abspath(path if is_hugging_face(path) else find_checkpoint(path)))
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        # escapes make + and the word vs ours
        paths.append([re.sub(r'\bvs\b', '%76s', quote(os.fsencode(part), safe=''))
                      for part in path.parts])
    shared = os.path.commonprefix([parts[:-1] for parts in paths])
    rest = ['+'.join(parts[len(shared):]) for parts in paths]
    return Path('out_report', *shared, '-vs-'.join(rest))


def load_pair():
    """The Config of the command line, and the two Subjects by their labels. Raises UserError."""
    config, subject = program.read_command(Config)
    pair = [subject, program.load_subject(config.other, subject.device, key='other')]
    if same_model(config.model, config.other):
        raise UserError(f'other={config.other!r} is the same as model={config.model!r}: give '
                        'another')
    program.name_pair(*pair)
    for subject in pair:
        if config.text:  # report a mistake in it before the work, not after
            program.text_tokens(subject, config.text)
    return config, {subject.label: subject for subject in pair}


def main():
    config, subjects = load_pair()
    out_dir = program.make_folder(config.out_dir or pair_folder(config.model, config.other))
    for label, subject in subjects.items():
        print(f'{label}: {describe(subject.model)}')
    body = [heading(subjects)]
    sources = {label: subject.source for label, subject in subjects.items()}
    for name in progress_bar(list(PARTS), 'report'):
        module, results, left_out = run_part(name, subjects, config)
        if results:
            figures = {name: module.plot(results)}
            used = program.settings(module, config, config.model)
            program.save(name, {'models': sources, **results}, figures, used, out_dir)
        for line in left_out:
            print(f'{name}: left out for {line}')
        body.append(section(name, module, results, left_out, out_dir))
    with program.writing_to(out_dir):
        page = PAGE.format(title='MHA and MLA taken apart', body='\n'.join(body))
        (out_dir / 'report.html').write_text(page, encoding='utf-8')
    print(f'saved {out_dir / "report.html"}')


if __name__ == '__main__':
    run(main)
