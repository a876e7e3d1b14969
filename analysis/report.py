"""
All of it for an MHA and an MLA model side by side, in one file: report.html.

    python -m analysis.report out_shakespeare_quick/ckpt.pt out_shakespeare_quick/ckpt_mla.pt

It needs two models. Attention, logit lens, patching and token losses answer to hover, click and
arrow keys. What cannot serve one of the models is named at the end. The pictures and numbers of
each analysis lie beside report.html, in a folder of this pair:
out_report/out_shakespeare_quick/ckpt.pt-vs-ckpt_mla.pt.
"""

import html
import os
import re
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

from configurator import UserError, run

import visualize_residual_space_gpt2 as residual_space
from analysis import page, patching, program
from analysis.page.summary import checkpoint_of, draw_curves, summary
from analysis.subject import load_subject, name_pair, text_tokens
from generate import sample_text
from models import describe
from runtime.loading import find_checkpoint, is_hugging_face
from runtime.progress import progress_bar

PARTS = {
    'induction_heads': 'The prefix-matching score is the mean attention, over the second copy of '
        'repeated random tokens, to the token that followed the same token in the first copy: 1 is '
        'a perfect induction head.',
    'attention_patterns': 'Mean attention to the previous, the current and the first token and to '
        'the last occurrence of the same one, and the entropy of attention as a share of that of '
        'even attention, over repeated random tokens.',
    'logit_lens': 'What each layer would predict, if it were the last: the likeliest token, '
        'coloured by the probability of the right one. Below, what the heads write if each token '
        'reads itself alone.',
    'attribution': 'What each head, MLP and embedding adds directly to the logit of the likeliest '
        'token, less the mean over all tokens.',
    'patching': 'Two prompts that differ in one token. Each cell is one activation of the clean '
        'one put into the corrupted one: how much of the difference between the two predictions it '
        'brings back. 1 is all of it.',
    'token_loss': 'The loss of every token of a text in both models, and where they differ.',
    'induction_circuit': 'Where heads look when a stretch of random tokens comes twice, at lags '
        'that differ: at the first occurrence (0), at what followed it (1: classical induction) or '
        'further (shifted); how far back they look; and how much is copied without each head.',
    'induction_in_text': 'Attention in a text to what followed the same token before, beside what '
        'places alone give; and how much more is lost without a head where induction is right than '
        'where the next token came before elsewhere.',
    'ablation': 'How much the loss, and the difference between the loss late and early in the '
        'context, change with each head, MLP or layer at zero, at its mean, or resampled.',
    'ioi': 'After "When Mary and John walked to the store, John gave a drink to": logit of Mary '
        'less that of John, what each head adds to it directly, and how much of it comes back when '
        'one head is patched into a prompt with other names.',
    'copying': 'Eigenvalues of the full OV circuit (1: reading a token raises its own logit, -1: '
        'lowers it), and how often a head alone puts a token that it reads among the five '
        'likeliest, or the five unlikeliest.',
    'composition': 'How much of what a head writes is read by the query, key and value side of '
        'each later head, less what random matrices of the same shape give.',
    'subspaces': 'Overlap (mean squared cosine of the principal angles) of the spaces that heads '
        'write to and read their keys and values from: 1 is the same space.',
    'latent_directions': 'Directions of the residual stream in the order in which attention reacts '
        'to them through the latent, and the part that keys have in each direction of the latent: '
        '1 is used by keys alone, 0 by values alone.',
    'spectrum': 'Singular values of W_Q W_K^T and W_V W_O of every head, in the weights and over a '
        'text; effective rank; and how many lie beyond the edge of noise.',
    'similarity': 'CKA of the residual streams of the two models on the same text, after the '
        'embedding (0) and each block, and of what their heads write: 1 is the same up to rotation '
        'and scale.',
}
TOGETHER = ('similarity', 'token_loss')  # analyses of both models in one
SAMPLE_TOKENS = 300
NAVIGATION = '<!-- links -->'  # comes in its place when all parts are there


@dataclass
class Config(program.AnalysisConfig):
    model: str = ''  # the MHA model: a checkpoint, an out_dir, a Hugging Face directory, or gpt2
    other: str = ''  # the MLA model, or another one
    out_dir: str = ''  # where report.html goes, and picture and numbers of each part; '':
        # in out_report/, a folder for each pair
    text: str = ''  # for the parts that read one: FILE:book.txt or a dataset; '': the val split
        # that each checkpoint names
    prompt: str = ''  # for the parts that read one; '': how the val split begins


@dataclass
class Report:
    """What a page is made of, as far as the parts have been run."""
    subjects: dict  # by label
    config: Config
    out_dir: Path
    body: list = field(default_factory=list)  # HTML
    data: dict = field(default_factory=dict)  # of the parts that page.js fills
    left_out: list = field(default_factory=list)  # lines: which part, and why


def shared_answers(name, report):
    """The likeliest tokens of the first model as the settings of both, so that attribution and
    patching ask two models one question. {} for other analyses, and for models that read other
    tokens."""
    first, other = report.subjects.values()
    if name not in ('attribution', 'patching') or first.tokenizer != other.tokenizer:
        return {}
    try:
        if name == 'patching':
            pair = patching.read_pair(first, program.settings(patching, report.config, ''))
            ids = {'answer': pair.answer, 'against': pair.against}
        else:
            logits = first.run(first.prompt(report.config.prompt)).logits
            ids = {'answer': int(logits[0, -1, :first.n_vocab].argmax())}
        texts = {key: first.tokenizer.decode([i]) for key, i in ids.items()}
        is_text = all(first.tokenizer.encode(text) == [ids[key]] for key, text in texts.items())
    except UserError:  # the analysis says it too
        return {}
    return texts if is_text else {}


def run_part(name, report):
    """The module of one analysis, and its results by the names of the models. What it cannot serve
    is noted in the report."""
    module, results, subjects = import_module(f'analysis.{name}'), {}, report.subjects
    jobs = {label: (module.analyse, subject) for label, subject in subjects.items()}
    if name in TOGETHER:
        jobs = {' and '.join(subjects): (module.compare, *subjects.values())}
    answers = shared_answers(name, report)
    for label, (analyse, *models) in jobs.items():
        try:
            config = program.settings(module, report.config, models[0].source)
            results[label] = analyse(*models, replace(config, **answers))
        except UserError as e:
            report.left_out.append(f'{name} for {label}: {e}')
    return module, results


def touchable(name, results, report):
    """The HTML of what page.js draws of a part, side by side for the models; '' where it draws
    nothing. Its data goes to the report."""
    made = []

    def add(kind, key, title, data):
        report.data[key] = data
        made.append(page.part(kind, key, title))
    for label, result in results.items():
        if name == 'attention_patterns':
            prompt = prompt_of(report.subjects[label], report)
            if prompt:
                run = report.subjects[label].run(prompt)
                add('attention', f'{name} {label}', f'{label}: every head over the prompt',
                    page.attention_data(run))
        elif name == 'logit_lens':
            for kind, lens in (('residual stream', result.stream),
                               (f'{result.source} alone', result.alone)):
                add(name, f'{name} {label} {kind}', f'{label}: {kind}',
                    page.lens_data(lens, result.tokens))
        elif name == 'patching':
            add(name, f'{name} {label}', f'{label}: {result.answer} less {result.against}, '
                f'{result.corrupted:+.2f} to {result.clean:+.2f} nats', page.patching_data(result))
        elif name == 'token_loss':
            add(name, name, 'The text', page.token_loss_data(result))
    # the streams of both models beside each other, then what latents write
    return page.pair(made[::2] + made[1::2] if name == 'logit_lens' else made) if made else ''


def prompt_of(subject, report):
    """The ids of the report's prompt; None where there is none, which other parts report."""
    try:
        return subject.prompt(report.config.prompt)
    except UserError:
        return None


def add_part(name, report):
    """Run one analysis, save its picture and numbers, and add its part to the page."""
    module, results = run_part(name, report)
    if not results:
        return
    sources = {label: subject.source for label, subject in report.subjects.items()}
    used = program.settings(module, report.config, report.config.model)
    figures = {name: module.plot(results)}
    program.save(name, {'models': sources, **results}, figures, used, report.out_dir)
    title = name.replace('_', ' ')
    report.body += [f'<h2 id="{name}">{title}</h2>', f'<p>{html.escape(PARTS[name])}</p>']
    drawn = touchable(name, results, report)
    tables = [f'<div><h3>{html.escape(label)}</h3><pre>{html.escape(module.table(result))}</pre>'
              '</div>' for label, result in results.items()]
    image = page.picture(title, report.out_dir / f'{name}.png', is_wide=True)
    if drawn:
        image = f'<details><summary>As a picture</summary>{image}</details>'
    report.body += [drawn, image, page.pair(tables)]


def title_of(report):
    return f'{" and ".join(report.subjects)} taken apart'


def add_summary(report):
    """The title, what is known of the two models, and how they were trained."""
    checkpoints = [checkpoint_of(subject) for subject in report.subjects.values()]
    report.body += [f'<h1>{html.escape(title_of(report))}</h1>',
                    summary(report.subjects, checkpoints), NAVIGATION]
    figure = draw_curves(report.subjects, checkpoints)
    if figure:
        add_figure(report, 'training', 'How they were trained', figure)


def add_figure(report, name, title, figure):
    program.save_figures({name: figure}, report.out_dir, report.config.format)
    report.body += [f'<h2 id="{name}">{title}</h2>',
                    page.picture(title, report.out_dir / f'{name}.png')]


def add_residual_space(report):
    """The residual stream of each model over the prompt, in two dimensions."""
    made = []
    for label, subject in report.subjects.items():
        ids = prompt_of(subject, report)
        if ids is None or len(ids) < 2:
            report.left_out.append(f'residual stream for {label}: there is no prompt of two tokens')
            continue
        config = residual_space.ResidualConfig(model=subject.source)
        result = residual_space.analyse_ids(subject, ids, config)
        name = f'residual_space_{len(made) + 1}'
        figure = residual_space.draw_trajectories(label, result)
        program.save_figures({name: figure}, report.out_dir, report.config.format)
        made.append(page.picture(f'residual stream of {label}', report.out_dir / f'{name}.png'))
    if made:
        report.body += ['<h2 id="residual_stream">residual stream</h2>',
                        '<p>Each token over the prompt, from the embedding through every block, in '
                        'the two directions of most variance.</p>', page.pair(made)]


def add_samples(report):
    made = []
    for label, subject in report.subjects.items():
        if not subject.tokenizer.knows_text:
            report.left_out.append(f'samples for {label}: what its ids mean is unknown')
            continue
        text = sample_text(subject.model, subject.tokenizer, report.config.seed, SAMPLE_TOKENS)
        made.append(f'<div><h3>{html.escape(label)}</h3><pre>{html.escape(text)}</pre></div>')
    if made:
        report.body += ['<h2 id="samples">samples</h2>',
                        f'<p>{SAMPLE_TOKENS} tokens at temperature 0.8.</p>', page.pair(made)]


def navigation(body):
    """Links to the parts that are there."""
    names = re.findall(r'<h2 id="(\w+)">', ''.join(body))
    return '<nav>' + ' '.join(f'<a href="#{name}">{name.replace("_", " ")}</a>'
                              for name in names) + '</nav>'


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
    pair = [subject, load_subject(config.other, subject.device, key='other')]
    if same_model(config.model, config.other):
        raise UserError(f'other={config.other!r} is the same as model={config.model!r}: give '
                        'another')
    name_pair(*pair)
    for subject in pair:
        if config.text:  # report a mistake in it before the work, not after
            text_tokens(subject, config.text)
    return config, {subject.label: subject for subject in pair}


def main():
    config, subjects = load_pair()
    out_dir = program.make_folder(config.out_dir or pair_folder(config.model, config.other))
    for label, subject in subjects.items():
        print(f'{label}: {describe(subject.model)}')
    report = Report(subjects, config, out_dir)
    add_summary(report)
    for name in progress_bar(list(PARTS), 'report'):
        add_part(name, report)
    add_residual_space(report)
    add_samples(report)
    if report.left_out:
        report.body += ['<p class="left-out"><b>Left out:</b> '
                        + html.escape('; '.join(report.left_out)) + '</p>']
        print('left out: ' + '; '.join(report.left_out))
    links = navigation(report.body)
    body = '\n'.join(links if part == NAVIGATION else part for part in report.body)
    with program.writing_to(out_dir):
        text = page.page(title_of(report), body, report.data)
        (out_dir / 'report.html').write_text(text, encoding='utf-8')
    print(f'saved {out_dir / "report.html"}')


if __name__ == '__main__':
    run(main)
