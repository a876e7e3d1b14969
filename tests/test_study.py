"""The study: its data, its statistics, its sentences, and that it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from configurator import UserError

import numpy as np
import pytest
import torch
from analysis_models import copying_model, random_model
from conftest import tiny_model
from scipy import stats

import study
import study_cells
import study_check
import study_findings
import study_report
from analysis import ablation, induction_circuit, spectrum, statistics
from analysis.program import as_json
from analysis.subject import Subject, load_subject
from data.induction.prepare import CHARACTERS, InductionConfig, draw_sequences
from data.induction.prepare import main as prepare_induction
from evaluate import split_loss, token_losses
from model import GPT, GPTConfig
from model_mla import GPT_MLA, MLAConfig
from runtime.batches import TRAINING, Batches
from runtime.checkpoint import save_checkpoint
from runtime.dataset import open_data, write_splits
from runtime.tokenizer import make_tokenizer
from study_controls import GPT_LoudRotaryKey, control
from study_text import in_text, ladder
from train import TrainConfig

ROOT = Path(__file__).parents[1]


# data


@pytest.mark.parametrize('task', ['stretch', 'period', 'cycle'])
def test_what_is_known_is_what_a_copy_decides(task):
    ids, known = draw_sequences(task, 300, 33, 10 ** 9, seed=3)  # none repeats by chance
    lags = set()
    for row, marks in zip(ids, known):
        for i in range(33):
            earlier = [j for j in range(i) if row[j] == row[i]]
            before = [j for j in range(1, i) if row[j - 1] == row[i - 1]]
            follows = bool(before) and row[before[-1]] == row[i]
            # a period is known before anything has been seen twice
            assert marks[i] == (follows or task == 'period' and i == 16), (row, i)
            lags |= {i - earlier[-1]} if earlier else set()
    assert (len(lags) == 1) == (task == 'period')
    if task == 'stretch':
        assert {int(n) for n in known.sum(1)} == set(range(7, 15))
        assert lags <= set(range(8, 26)) and len(lags) > 12


def test_bins_of_sequences_are_read_sequence_by_sequence(tmp_path, program):
    args = ['--sequences=64', f'--out_dir={tmp_path}', '--vocabulary=70']
    code, out, err = program(prepare_induction, *args)
    assert code == 0 and '2,112 in train.bin, 132 in val.bin' in out, err
    data = open_data(str(tmp_path))
    assert data.sequence == 33 and data.tokenizer.n_vocab == 70
    rows = {tuple(row) for row in np.array(data.train).reshape(-1, 33).tolist()}
    batches = Batches(data, 8, 32, 70, 1, torch.device('cpu'))
    seen = set()
    for number in range(8):
        x, y = batches.draw('train', TRAINING, number)
        seen |= {(*a, b[-1]) for a, b in zip(x.tolist(), y.tolist())}
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert seen == rows  # an epoch is each sequence once
    with pytest.raises(UserError, match='--block_size=32'):
        data.check(64, 70)
    model = tiny_model(GPT, block_size=32, vocab_size=70)
    windows = torch.from_numpy(np.array(data.val).reshape(-1, 33).astype(np.int64))
    by_hand = token_losses(model, windows[:, :-1], windows[:, 1:]).mean().item()
    assert split_loss(model, data.val, sequence=33) == pytest.approx(by_hand, abs=1e-9)
    assert split_loss(model, data.val) != pytest.approx(by_hand, abs=1e-6)


def test_the_windows_of_an_analysis_are_sequences(tmp_path, program):
    program(prepare_induction, '--sequences=64', f'--out_dir={tmp_path / "bins"}')
    data = open_data(str(tmp_path / 'bins'))
    rows = torch.from_numpy(np.array(data.val).reshape(-1, 33).astype(np.int64))
    model = random_model(GPT, block_size=32, vocab_size=64)
    save_checkpoint(tmp_path / 'ckpt.pt', model, data.tokenizer,
                    {'dataset': str(tmp_path / 'bins')}, 1)
    subject = load_subject(str(tmp_path / 'ckpt.pt'), 'cpu')
    assert torch.equal(torch.cat(subject.windows('', 4 * 32, 32)), rows)
    assert torch.equal(torch.cat(subject.windows('', 20, 10)), rows[:2, :11])
    with pytest.raises(UserError, match='has 33 tokens, and 41 are needed'):
        subject.windows('', 100, 40)
    for analysis in (ablation, spectrum):
        analysis.analyse(subject, analysis.Config(max_tokens=128))


def test_a_record_without_sequences_says_nothing_of_them(tmp_path):
    write_splits(tmp_path, [0, 1] * 50, [1, 0] * 50, make_tokenizer(list('ab')))
    assert open_data(str(tmp_path)).sequence is None
    (tmp_path / 'meta.pkl').unlink()
    (tmp_path / 'meta.json').write_text('{"tokenizer": {"unknown": 2}, "sequence": "many"}')
    with pytest.raises(UserError, match="sequence='many'"):
        open_data(str(tmp_path))


@pytest.mark.parametrize('args, words', [
    (['--length=20'], 'length=20 must be at least 30'), (['--sequences=1'], 'sequences=1'),
    (['--vocabulary=100000'], 'must be at most'), (['--task=nothing'], 'task='),
    (['--out_dir=/proc/none'], 'out_dir=/proc/none cannot be written to')])
def test_bad_settings_of_the_data(args, words, program):
    code, _, err = program(prepare_induction, *args)
    assert code == 2 and words in err and err.count('\n') == 1
    assert InductionConfig().length == 33


# statistics


def test_survival_is_that_of_a_textbook():
    """Remission in weeks (Freireich et al. 1963), as in Collett, "Modelling Survival Data"."""
    times = [6, 6, 6, 7, 10, 13, 16, 22, 23, *[None] * 12]
    ends = [0] * 9 + [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    found = statistics.survival(times, ends)
    assert found.median == 23 and found.events == 9 and found.n == 21
    remaining = dict(zip(found.times.tolist(), found.remaining.tolist()))
    assert [remaining[6], remaining[22]] == pytest.approx([0.857, 0.538], abs=1e-3)
    assert statistics.survival(placebo, [0] * 21).median == 8
    # chi-square 16.79
    p = statistics.logrank_p(times, ends, placebo, [0] * 21)
    assert p == pytest.approx(stats.chi2.sf(16.79, 1), rel=0.01)
    never = statistics.survival([None] * 3, [9] * 3)
    assert np.isnan(never.median) and never.events == 0
    assert np.isnan(statistics.logrank_p([None], [9], [None], [9]))


def test_intervals_are_those_of_other_programs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=12), rng.normal(size=12)
    found, theirs = statistics.paired(a, b), stats.ttest_rel(a, b).confidence_interval()
    assert [found.low, found.high] == pytest.approx([theirs.low, theirs.high])
    assert np.isnan(statistics.mean([1.0]).low) and statistics.mean([1.0]).sign() == 0
    found, theirs = statistics.share([1, 1, 0, 1]), stats.binomtest(3, 4).proportion_ci(
        method='wilson')
    assert [found.low, found.high] == pytest.approx([theirs.low, theirs.high])


def test_the_interval_of_paired_shares_covers():
    """In draws from a known distribution, about 95 % of the intervals hold the true difference."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(2000):
        u = rng.random(20)
        a, b = u < 0.7, u < rng.choice([0.4, 0.9], size=20)  # not independent
        found = statistics.paired_shares(a.tolist(), b.tolist())
        inside += found.low <= 0.7 - 0.65 <= found.high
    assert 0.93 < inside / 2000 < 0.985


# sentences


LABELS = {name: attention.label for name, attention in study.ATTENTIONS.items()}


def cell(algorithm='classical', at=1000, shift=1, accuracy=0.95, duplicates=()):
    iters = list(range(100, 3001, 100))
    rises = [0.9 if at is not None and i >= at else 0.1 for i in iters]
    earlier = [0.9 if at is not None and i >= at - 200 else 0.1 for i in iters]
    scores = dict.fromkeys(study_findings.EVENTS, earlier) | {
        'accuracy': rises, 'induction': rises, 'classical': rises}
    return {'max_iters': 3000, 'late_accuracy': 0.9,
            'development': {'iters': iters, 'losses': [3.0] * len(iters), 'scores': scores},
            'circuit': {'algorithm': algorithm, 'shift': shift, 'accuracy': accuracy,
                        'chance': 1 / 64, 'score': rises[-1], 'without_named': 0.01,
                        'without_others': 0.9, 'named': 4, 'duplicates': list(duplicates)}}


def of_cells(**cells):
    return study_cells.Study({(name, ''): dict(enumerate(found)) for name, found in cells.items()},
                              {}, LABELS)


def test_a_difference_is_said_where_its_interval_excludes_zero_alone():
    shifted = cell('shifted', shift=4)
    alike = of_cells(mha=[cell(), shifted] * 5, mla32=[shifted, cell()] * 5)
    for claim in study_findings.algorithms(alike).claims:
        assert claim.startswith('No difference seen') and '+0%' in claim and '10 pairs' in claim
    apart = of_cells(mha=[shifted] * 9 + [cell()], mla32=[cell()] * 10)
    claim, other, heads = study_findings.algorithms(apart).claims
    assert claim.startswith('MLA 32 ends in the classical circuit more often') and '+90%' in claim
    assert other.startswith('MLA 32 ends in a shifted one less often') and '-90%' in other
    assert heads.startswith('No difference seen: how often MLA 32 has a duplicate-token head')
    twice = of_cells(mha=[cell()] * 10, mla32=[cell('shifted', shift=4, duplicates=[[0, 1]])] * 10)
    finding = study_findings.algorithms(twice)
    claim, _, heads = finding.claims
    assert 'less often' in claim and '-100%' in claim
    assert heads.startswith('MLA 32 has a duplicate-token head more often') and '+100%' in heads
    assert [row[-1] for row in finding.rows[1:]] == [0, 10]


def test_of_four_pairs_no_difference_of_shares_is_said():
    """All may differ, and a test of signs still gives p = 0.125, or 0.0625 by the mid-p rule."""
    for n, said in ((4, False), (5, True)):
        claims = study_cells.compared_shares([True] * n, [False] * n, 'more', 'less', 'same')
        assert bool(claims) == said == bool(claims and claims[0].startswith('more'))


def test_runs_that_never_form_count_in_the_times():
    late = of_cells(mha=[cell(at=None, algorithm='none')] * 8, mla32=[cell(at=900)] * 8)
    finding = study_findings.times(late)
    assert finding.rows[1][2] == 0 and 'not reached' in finding.rows[1][3]
    assert finding.rows[2][3].startswith('900') and ' differ:' in finding.claims[0]
    same = study_findings.times(of_cells(mha=[cell()] * 4, mla32=[cell()] * 4))
    assert 'do not differ visibly: medians 1,000 and 1,000,' in same.claims[0]
    never = [cell(at=None, algorithm='none')] * 4
    assert study_findings.times(of_cells(mha=never, mla32=never)).claims == []
    slow = study_cells.Study({('mha', 'slow'): dict(enumerate([cell(at=600)] * 8)),
                              ('mla32', 'slow'): dict(enumerate([cell(at=900)] * 8))}, {}, LABELS)
    assert study_findings.variations(slow).claims[-1].startswith(
        'The times of MHA and MLA 32 until a head is above 0.4 (learning rate 1e-3) differ: '
        'medians 600 and 900, log-rank p < 0.001, 8 and 8 seeds')


def test_the_cells_of_the_repository_are_those_of_a_night():
    names = {path.stem for path in (ROOT / 'study/cells').glob('*.json')}
    assert names and names <= {cell.name for cell in study.PRESETS['night']}


def test_what_comes_first():
    runs = of_cells(mha=[cell(at=1000), cell(at=1500), cell(at=2000)])
    claim, = study_findings.birth(runs).claims
    assert 'before the induction head' in claim and '-200 (-200 to -200)' in claim
    wobbles = cell(at=1000)
    wobbles['development']['scores'] |= {'previous': [0.1, 0.9, 0.1, *[0.1] * 17, *[0.9] * 10]}
    assert study_findings.half_way(wobbles, 'previous') == 2100


def test_slopes_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = 3 + 2 * x + rng.normal(size=20)
    (slope,), intercept, left = statistics.least_squares(x, y)
    line = stats.linregress(x, y)
    margin = stats.t.ppf(0.975, 18) * line.stderr
    assert (slope.value, slope.low, slope.high) == pytest.approx(
        (line.slope, line.slope - margin, line.slope + margin))
    assert intercept == pytest.approx(line.intercept)
    assert left ** 2 * 18 == pytest.approx(((y - line.intercept - line.slope * x) ** 2).sum())
    both, intercept, left = statistics.least_squares(np.stack([x, x ** 2], 1), 1 + x - 3 * x ** 2)
    assert [slope.value for slope in both] == pytest.approx([1, -3])
    assert intercept == pytest.approx(1) and left < 1e-9
    for columns in (np.stack([x, 2 * x], 1), np.ones((20, 1))):  # which cannot be told apart
        with pytest.raises(ValueError, match='20 runs do not tell'):
            statistics.least_squares(columns, y)


def test_a_slope_has_room_for_what_y_may_be():
    x, y, within = np.arange(6.0), 1 - 2 * np.arange(6.0), np.array([0.1, 0.2, 0.0, 0.3, 0.1, 0.4])
    slopes = [np.polyfit(x, y + within * signs, 1)[0] for signs in product((-1, 1), repeat=6)]
    (slope,), *_ = statistics.least_squares(x, y, within)
    assert (slope.value, slope.low, slope.high) == pytest.approx((-2, min(slopes), max(slopes)))


def test_what_makes_the_decoupled_late():
    never = cell(at=None, algorithm='none')
    finding = study_findings.late(of_cells(decoupled16=[cell()] * 8, decoupled48=[never] * 8,
                                           loud48=[never] * 8))
    assert [row[3] for row in finding.rows] == ['formed', 8, 0, 0]
    width, loud, previous = finding.claims
    assert width.startswith('MLA 48 decoupled forms induction less often than MLA 16 decoupled: -')
    assert loud.startswith('No difference seen') and '+0%' in loud
    assert ('0.10 (0.10 to 0.10) in the 16 of these runs that do not copy, and 0.90 (0.90 to 0.90) '
            'in the 8 that do.') in previous


def test_the_law_of_the_least_latent():
    """With a latent that must have 1.5 times the root of the vocabulary, whatever else there is."""
    cells = {}
    for size, (heads, vocabulary, *_) in study_findings.SIZES.items():
        for n in (4, 8, 12, 16, 24, 32):
            copies = 'classical' if n >= 1.5 * vocabulary ** 0.5 else 'none'
            cells[f'mla{n}', size] = {seed: cell(algorithm=copies) for seed in (1, 2)}
    found = study_cells.Study(cells, {}, LABELS)
    assert study_findings.least_latents(found, '') == {1: (8, 12), 2: (8, 12)}
    assert study_findings.least_latents(found, 'vocabulary256') == {1: (16, 24), 2: (16, 24)}
    heads, vocabulary, width, fitted = study_findings.law(found).claims
    assert heads.startswith('No difference seen') and width.startswith('No difference seen')
    assert vocabulary.startswith('The least latent grows with the vocabulary, as its power: +0.')
    assert fitted.startswith('The fitted law is')
    unknown = study_cells.Study({(f'mla{n}', ''): {1: cell(), 2: cell(algorithm='none'),
                                                   **({3: cell()} if n > 8 else {})}
                                 for n in (4, 8, 12, 16, 24)}, {}, LABELS)
    assert study_findings.least_latents(unknown, '') == {1: None, 2: None}
    assert study_findings.law(unknown).claims == []
    none = study_cells.Study({('mha', 'wide'): {seed: cell() for seed in range(3)}, **{
        (f'mla{n}', 'wide'): {seed: cell(algorithm='none') for seed in range(3)}
        for n in (8, 12, 16, 24)}}, {}, LABELS)
    claim, = study_findings.law(none).claims
    assert claim == ('With number of heads 4, vocabulary 64, width 128 and learning rate 0.003 MHA '
                     'copies within 3,000 iterations, and MLA with n_latent 8 to 24 does not; '
                     '3 and 3 seeds.')
    one_size = study_cells.Study({key: of for key, of in cells.items() if key[1] == ''}, {}, LABELS)
    claims = study_findings.law(one_size).claims
    assert len(claims) == 3 and all('is not known' in claim for claim in claims)


def test_the_ladder_says_whether_a_published_sign_comes_out():
    bits = {'mha': [2.0, 2.1, 1.9], 'mha_learned': [2.2, 2.31, 2.1], 'mla_learned': [2.1, 2.2, 2.0],
            'decoupled24': [2.0, 2.3, 2.0]}
    cells = {(name, 'plays'): {seed: {'bits_per_byte': b, 'cached': 32, 'parameters': 1000}
                               for seed, b in enumerate(of)} for name, of in bits.items()}
    finding = ladder(study_cells.Study(cells, {}, LABELS), 'plays')
    rotary, latent, decoupled = finding.claims
    assert 'needs more bits than MHA (no rotary positions): +0.2033' in rotary
    assert rotary.endswith('more. It comes out here.')
    assert latent.endswith('more. The opposite comes out here.') and 'fewer bits' in latent
    assert decoupled.startswith('No difference seen') and decoupled.endswith('cannot be told here.')


def reader(excess, random, alone):
    """A cell whose best head in a text is 1.1."""
    attention = np.full((2, 2), 0.1)
    attention[1, 1], attention[0, 0] = 0.1 + excess, 0.9  # a first layer does no induction
    return {'bits_per_byte': 2.0, 'in_text': {
        'attention': attention.tolist(), 'expected': [[0.1, 0.1], [0.1, 0.1]],
        'random': [[0.99, 0.0], [random, 0.0]], 'alone': [[9.0, 9.0], [9.0, alone]]},
        'development': {'iters': [0, 500], 'scores': {'induction': [0.0, random]}}}


def test_what_heads_do_in_a_text():
    cells = {('mha', 'reading'): {i: reader(0.3 + i / 100, 0.8, 0.5 + i / 100) for i in range(3)},
             ('mla32', 'reading'): {i: reader(0.01 * i, 0.1, i - 1.0) for i in range(3)}}
    finding = in_text(study_cells.Study(cells, {}, LABELS))
    formed, attends, needed, *others = finding.claims
    assert formed.startswith('On random tokens MHA has a head above 0.4 in 3 of 3 runs')
    assert 'more than its mean pattern' in attends and '+0.310' in attends
    assert needed.startswith('Repeats need that head of MHA') and '+0.510' in needed
    assert 'in 0 of 3 runs; the best head scores 0.100' in others[0]
    assert all(claim.startswith('No difference seen') for claim in others[1:3])
    assert others[3].startswith('MLA 32 attends less to what followed') and '-0.300' in others[3]
    *curves, threshold = finding.figure.axes[0].lines
    assert [curve.get_ydata()[-1] for curve in curves] == [0.8] * 3 + [0.1] * 3


def test_the_report_is_one_page(tmp_path):
    for name, found in (('mha', cell('shifted', shift=4)), ('decoupled32', cell())):
        for seed in range(5):
            (tmp_path / 'cells').mkdir(exist_ok=True)
            (tmp_path / 'cells' / f'{name}-{seed}.json').write_text(json.dumps(
                {'cell': {'attention': name, 'seed': seed, 'variation': ''}, **found}))
    page = study_report.write_report(tmp_path, LABELS, 'python study.py').read_text()
    assert 'MLA 32 decoupled ends in the classical circuit more often' in page
    assert 'src="http' not in page and page.count('data:image/png') >= 3
    assert 'What this does not show' in page and (tmp_path / 'which_circuit_copies.png').exists()


# cells


@pytest.mark.parametrize('keys, values', [('trained', 'trained'), ('trained', 'direct'),
                                          ('rotated', 'rotated'), ('direct', 'direct')])
def test_controls_are_an_mla_whose_keys_and_values_share_nothing(keys, values):
    torch.manual_seed(0)
    config = MLAConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16, n_latent=32,
                       rotary='all', bias=False)
    model = control(keys, values)(config)
    drawn = [block.attn.latent_enc.weight.detach().clone() for block in model.transformer.h]
    x = torch.randint(20, (4, 17))
    train_for_a_moment(model, x)
    model(x[:, :16])  # which the last step's weight decay is taken back from
    for block, W in zip(model.transformer.h, drawn):
        for kind, before, half in zip((keys, values), W.split(16),
                                      block.attn.latent_enc.weight.split(16)):
            assert (kind == 'trained') != torch.equal(before, half)
            if kind != 'trained':
                assert torch.allclose(half @ half.T, torch.eye(16), atol=1e-5)
        assert block.attn.key.weight[:, :16].any() and not block.attn.key.weight[:, 16:].any()
        assert block.attn.value.weight[:, 16:].any() and not block.attn.value.weight[:, :16].any()
    ordinary = GPT_MLA.from_state_dict(config, model.state_dict()).eval()
    assert torch.allclose(ordinary(x[:, :16])[0], model.eval()(x[:, :16])[0], atol=1e-6)


def test_the_control_without_latents_learns_as_mha():
    config = dict(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16, rotary='all',
                  bias=False, mlp=False)
    model = control('direct', 'direct')(MLAConfig(**config, n_latent=32))
    mha = GPT(GPTConfig(**config))
    with torch.no_grad():
        for mine, theirs in zip(model.transformer.h, mha.transformer.h):
            theirs.attn.c_attn.weight.copy_(torch.cat((
                mine.attn.query.weight, mine.attn.key.weight[:, :16],
                mine.attn.value.weight[:, 16:])))
            theirs.attn.c_proj.weight.copy_(mine.attn.c_proj.weight)
        mha.transformer.wte.weight.copy_(model.transformer.wte.weight)
    x = torch.randint(20, (4, 17))
    for one in (model, mha):
        train_for_a_moment(one, x)
    assert torch.allclose(model.eval()(x[:, :16])[0], mha.eval()(x[:, :16])[0], atol=1e-5)


def test_the_control_with_a_large_rotary_key_starts_so():
    torch.manual_seed(0)
    config = MLAConfig(block_size=16, vocab_size=20, n_layer=1, n_head=4, n_embd=64, n_latent=48,
                       rotary='decoupled', n_rotary=8, bias=False)
    for model_class, std in ((GPT_MLA, 0.02), (GPT_LoudRotaryKey, 64 ** -0.5)):
        W = model_class(config).transformer.h[0].attn.latent_enc.weight
        assert W[48:].std().item() == pytest.approx(std, rel=0.15)
        assert W[:48].std().item() == pytest.approx(48 ** -0.5, rel=0.1)


def train_for_a_moment(model, x):
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.99), 'cpu')
    for _ in range(5):
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_presets_hold_each_cell_once_and_the_larger_ones_the_smaller():
    for name, cells in study.PRESETS.items():
        assert len({cell.name for cell in cells}) == len(cells), name
    assert set(sum(study.QUESTIONS.values(), [])) <= set(study.PRESETS['night'])
    assert set(study.PRESETS['minute']) < set(study.PRESETS['evening']) < set(
        study.PRESETS['night'])
    for cell in study.PRESETS['night']:  # all settings are the trainer's
        attention = study.ATTENTIONS[cell.attention]
        study.configure(cell.arguments(), TrainConfig, attention.model_class.config_class)


def save_cell(folder, name, model):
    """A cell of a study, of a model that nobody has trained."""
    tokenizer = make_tokenizer(CHARACTERS[:model.config.vocab_size])
    kind = '' if model.model_type == 'gpt' else f'_{model.model_type}'
    run = folder / 'runs' / name
    run.mkdir(parents=True)
    save_checkpoint(run / f'ckpt{kind}.pt', model, tokenizer, {}, 100)
    (folder / 'cells').mkdir(exist_ok=True)
    circuit = induction_circuit.analyse(Subject(model, tokenizer, '', name),
                                        induction_circuit.Config())
    (folder / 'cells' / f'{name}.json').write_text(json.dumps({'circuit': as_json(circuit)}))


def test_figures_are_those_of_loops_in_float64(tmp_path, program):
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=40, bias=False)
    save_cell(tmp_path, 'copying', copying_model(4))
    for name, model_class, settings in (
            ('gqa', GPT, dict(rotary='all', n_kv_head=2)), ('mlp', GPT, {}),
            ('mla', GPT_MLA, dict(rotary='all', n_latent=12, rotary_base=1000.0)),
            ('normed', GPT_MLA, dict(rotary='decoupled', n_rotary=4, n_latent=12, latent_norm=True,
                                     latent_scale=True, n_query_latent=9, mlp=False)),
            ('decoupled', GPT_MLA, dict(rotary='decoupled', n_rotary=4, n_latent=12, mlp=False))):
        save_cell(tmp_path, name, random_model(model_class, **sizes | settings))
    code, out, err = program(study_check.main, tmp_path)
    assert code == 0 and out.endswith('of 6 cells agree\n') and out[0] != '0', out + err
    path = tmp_path / 'cells' / 'decoupled.json'
    found = json.loads(path.read_text())
    found['circuit']['score'] += 0.01
    path.write_text(json.dumps(found))
    code, out, _ = program(study_check.main, tmp_path)
    assert code == 1 and 'decoupled: score is' in out
    code, _, err = program(study_check.main, tmp_path / 'nowhere')
    assert code == 2 and 'run python study.py' in err and err.count('\n') == 1


def test_a_study_goes_on_after_a_kill(tmp_path):
    """kill -9 of the program in the middle of training ends its workers. The same command then goes
    on where each cell was, and a third one finds nothing to do."""
    command = [sys.executable, 'study.py', '--preset=minute', '--max_iters=200',
               f'--out_dir={tmp_path}']
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             start_new_session=True)
    runs = [tmp_path / 'runs/mha-1/ckpt.pt', tmp_path / 'runs/decoupled32-1/ckpt_mla.pt']
    deadline = time.time() + 120
    while not all(map(os.path.exists, runs)):
        assert first.poll() is None and time.time() < deadline
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not list((tmp_path / 'cells').glob('*.json'))
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and '2 to train' in second.stdout, second.stderr
    for name in ('mha-1', 'decoupled32-1'):
        log = (tmp_path / 'runs' / name / 'log.txt').read_text()
        assert log.count('step      0') == 1 and log.count('context 32') == 2  # it went on
        found = json.loads((tmp_path / 'cells' / f'{name}.json').read_text())
        assert found['development']['iters'] == [100, 200]
    assert 'val loss' in (tmp_path / 'report.html').read_text()
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 0 and '0 to train' in third.stdout


def test_nothing_is_reported_of_nothing(program, tmp_path):
    code, _, err = program(study.main, '--only_report=True', f'--out_dir={tmp_path}')
    assert code == 2 and 'leave out --only_report' in err and err.count('\n') == 1


@pytest.mark.parametrize('args, words', [
    (['--preset=noon'], "preset='noon'"), (['--workers=-1'], 'workers=-1'),
    (['--out_dir='], 'empty'), (['--out_dir=/proc/none'], 'cannot be written to'),
    (['--max_iters=0'], 'max_iters=0'), (['--question=ladder'], 'take --preset=night')])
def test_bad_settings(args, words, program):
    code, _, err = program(study.main, *args)
    assert code == 2 and words in err and err.count('\n') == 1
