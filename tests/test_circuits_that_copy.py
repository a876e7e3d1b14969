"""Shifts of induction heads, the circuit that copies, what removal does to it, and when it forms:
on models made by hand, whose circuits are known, and by properties."""

import json
from functools import partial

from configurator import UserError

import numpy as np
import pytest
import torch
from analysis_models import copying_model, exact_mla, induction_model, random_model, same_function
from conftest import tiny_model

from analysis import development, induction_circuit, induction_heads, latent_surgery
from analysis.program import main as analysis_main
from analysis.record import record, run_block
from analysis.subject import Subject, load_subject
from data.induction.prepare import CHARACTERS
from model import GPT
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.tokenizer import make_tokenizer


def of(model):
    return Subject(model, make_tokenizer(CHARACTERS[:model.config.vocab_size]), '', 'a/model')


def circuit(model, **settings):
    return induction_circuit.analyse(of(model), induction_circuit.Config(**settings))


@pytest.mark.parametrize('convert', [lambda m: m, exact_mla], ids=['mha', 'mla'])
@pytest.mark.parametrize('shift', [1, 4, 9])
def test_a_circuit_made_by_hand_is_named(shift, convert):
    found = circuit(convert(copying_model(shift)))
    assert found.algorithm == ('classical' if shift == 1 else 'shifted') and found.shift == shift
    assert found.accuracy > 0.97 and found.score > 0.9
    assert found.readers == ['1.0'] and found.duplicates == []
    assert found.key_carriers == ['0.0'] and found.value_carriers == ['0.1']
    assert found.query_carriers == (['0.1'] if shift == 1 else [])
    assert np.isfinite([found.k_composition, found.v_composition]).all()
    # the cause: without it the model guesses, without the others it copies as before
    assert found.without_named < 0.15 and found.without_others == found.accuracy
    assert found.named == 3 and found.others == 3
    alone = np.array(found.alone)
    assert (alone[[0, 0, 1], [0, 1, 0]] < 0.2).all()
    assert (np.delete(alone.ravel(), [0, 1, 4]) == found.accuracy).all()


def test_the_classical_score_does_not_see_a_shift_and_the_best_shift_does():
    result = induction_heads.analyse(of(copying_model(4)), induction_heads.Config())
    assert result.scores[1, 0] < 0.05
    assert result.best_shift[1, 0] == 4 and result.best()[1, 0] > 0.9
    assert '1.0' in induction_heads.table(result)


def test_a_pattern_without_copying_is_no_circuit():
    found = circuit(induction_model())  # its reader writes nothing
    assert found.algorithm == 'none' and found.readers == ['1.0'] and found.accuracy < 0.2


def test_a_fixed_distance_is_no_induction():
    """A head that looks a fixed distance back is told from one that looks for a token: the first
    scores at one lag of many."""
    model, T = copying_model(1), 32
    second, n = model.transformer.h[1].attn, 40
    W_Q, W_K, _ = second.c_attn.weight.data.split(model.config.n_embd)
    W_Q.zero_(), W_K.zero_()
    W_Q[:T, n:n + T] = 10 * torch.eye(T)[(torch.arange(T) - 15).clamp_min(0)].T
    W_K[:T, n:n + T] = 10 * torch.eye(T)
    fixed = induction_heads.analyse(of(model), induction_heads.Config(length=16))
    assert fixed.scores[1, 0] > 0.9  # two copies of 16 alone cannot tell
    assert fixed.best()[1, 0] < 0.25
    assert circuit(model).algorithm == 'none'


def test_scores_are_those_of_the_definition():
    """Every pattern entry is looked up one by one, in loops."""
    model = random_model(GPT)
    subject, sequences = of(model), 5
    copies = induction_heads.copies_with_lags(model, subject.n_vocab, sequences, 3)
    n = copies.n_shifts
    shifted = induction_heads.shift_scores(subject, copies)
    back = induction_circuit.attention_back(model, copies.idx, n)
    T = copies.idx.size(1)
    for block in record(model, copies.idx):
        pattern = block.pattern().double()
        for head in range(model.config.n_head):
            for s in range(n):
                entries = [pattern[b, head, first + lag + i, first + i + s]
                           for b, (first, lag) in enumerate(zip(copies.first, copies.lag))
                           for i in range(copies.length)]
                assert shifted[block.layer, head, s] == pytest.approx(np.mean(entries), abs=1e-6)
                entries = [pattern[b, head, i, i - s] for b in range(sequences)
                           for i in range(n - 1, T)]
                assert back[block.layer, head, s] == pytest.approx(np.mean(entries), abs=1e-6)


def test_the_stretch_comes_twice_within_the_sequence():
    for block_size in (4, 5, 9, 16, 64, 100):
        model = tiny_model(GPT, block_size=block_size, vocab_size=14)
        copies = induction_heads.copies_with_lags(model, 14, 50, 0)
        assert copies.idx.size(1) == min(64, block_size)
        earlier = copies.idx.gather(1, copies.keys()[..., 0])
        assert (copies.idx.gather(1, copies.queries()) == earlier).all()
        assert (copies.lag >= max(copies.length, copies.n_shifts)).all()
        assert copies.queries().max() < copies.idx.size(1)
        if block_size > 8:
            assert len(copies.lag.unique()) > 3


# surgery


def copies_of(model, seed=0, n=20):
    return induction_heads.copies_with_lags(model, model.config.vocab_size, n, seed)


@pytest.mark.parametrize('settings', [{}, dict(rotary='all'), dict(rotary='decoupled', n_rotary=2)],
                         ids=['learned', 'all', 'decoupled'])
def test_reads_edits_keys_and_values_alone(settings):
    """With nothing in place of the input, keys and values are their biases, and queries and the
    rotary key are as before. With the input itself nothing changes."""
    model = random_model(GPT_MLA, **settings)
    x = torch.randn(2, 7, model.config.n_embd)
    before, same = run_block(model, 1, x), run_block(model, 1, x, reads=lambda x: x)
    assert torch.equal(before.after, same.after)
    edited = run_block(model, 1, x, reads=torch.zeros_like)
    assert torch.equal(edited.q, before.q)
    attention, width = model.transformer.h[1].attn, model.config.head_dim
    assert torch.equal(edited.k[..., width:], before.k[..., width:])
    bias = attention.value.bias.view(1, model.config.n_head, 1, -1)
    assert torch.allclose(edited.v, bias.expand_as(edited.v))


@pytest.mark.parametrize('model_class', [GPT, GPT_MLA])
def test_removing_all_that_is_read_is_reading_the_mean(model_class):
    model = random_model(model_class)
    layer = latent_surgery.Layer(model, 1, copies_of(model))
    basis = latent_surgery.reading_basis(model.transformer.h[1].attn)
    space, c = latent_surgery.Space(layer.read, basis), model.config
    # a layer norm leaves one direction of MHA's without variance
    assert space.rank == min(basis.size(1), c.n_embd - 1) == getattr(c, 'n_latent', c.n_embd - 1)
    everything = torch.eye(space.rank)
    with torch.no_grad():
        held = layer.logits(space.held(everything))
        mean = layer.logits(lambda x: space.mean.expand_as(x))
        whole = layer.logits()
        itself = layer.logits(space.held(everything, space.white(layer.read)))
        nothing = layer.logits(space.held(everything[:, :0]))
    assert torch.allclose(held, mean, atol=1e-4) and not torch.allclose(held, whole, atol=1e-3)
    assert torch.allclose(itself, whole, atol=1e-4) and torch.allclose(nothing, whole, atol=1e-4)


def test_what_is_left_is_uncorrelated_with_what_was_removed():
    model = random_model(GPT_MLA)
    layer = latent_surgery.Layer(model, 1, copies_of(model, n=200))
    space = latent_surgery.Space(
        layer.read, latent_surgery.reading_basis(model.transformer.h[1].attn))
    y = space.white(layer.read).flatten(0, 1).double()
    assert torch.allclose(y.mT @ y / len(y), torch.eye(space.rank).double(), atol=1e-3)
    V = space.random(torch.Generator().manual_seed(0))[:, :3]
    left = space.held(V)(layer.read) @ space.B
    removed = space.white(layer.read) @ V
    products = (left - left.mean((0, 1))).flatten(0, 1).mT @ removed.flatten(0, 1) / len(y)
    assert products.abs().max() < 1e-3 * left.std()


def test_the_space_does_not_depend_on_how_the_weights_divide_the_work():
    model = random_model(GPT_MLA)
    other = same_function(model)
    for block, twin in zip(model.transformer.h, other.transformer.h):
        # ln_1 is scaled against its readers there
        scale = (block.ln_1.weight / twin.ln_1.weight)[:, None]
        one = latent_surgery.reading_basis(block.attn)
        two = latent_surgery.orthonormal((latent_surgery.reading_basis(twin.attn) / scale).double())
        assert torch.allclose(one @ one.mT, (two @ two.mT).float(), atol=1e-4)


class OneDirection(latent_surgery.Layer):
    """A layer whose answers depend on what is read in one direction d (n_embd, 1) alone."""

    def __init__(self, d):
        self.d = d
        self.read = torch.randn(30, 7, len(d), generator=torch.Generator().manual_seed(0))
        self.read[..., 0] *= 9  # much variance that does not matter
        self.middle = self.read.mean((0, 1))
        self.targets = (self.read @ d < self.middle @ d)[..., 0].long()

    def logits(self, reads=None):
        x = 3 * ((self.read if reads is None else reads(self.read)) - self.middle) @ self.d
        return torch.cat((x, -x), dim=-1)


def test_the_search_finds_the_one_direction_that_matters():
    d = torch.nn.functional.normalize(torch.arange(8.0)[:, None], dim=0)
    layer = OneDirection(d)
    space = latent_surgery.Space(layer.read, torch.eye(8))
    assert abs(space.B[0, 0]) > 0.99  # the most variance, which is not what matters
    V = latent_surgery.search(layer, space, torch.zeros(8, 0), 1)
    # in the whitened space the direction is d times the scale
    wanted = torch.nn.functional.normalize(space.scale[:, None] * (space.B.mT @ d), dim=0)
    assert (V.mT @ wanted).abs().item() > 0.85
    assert layer.accuracy() == 1 and 0.3 < layer.accuracy(space.held(V)) < 0.7
    assert layer.accuracy(space.held(torch.eye(8)[:, :1])) > 0.95


def test_surgery_on_a_circuit_made_by_hand(monkeypatch):
    """Where values read another token, patched from a prompt with other tokens, the model says that
    one. Without everything that is read it guesses."""
    monkeypatch.setattr(latent_surgery, 'STEPS', 1)
    monkeypatch.setattr(latent_surgery, 'COUNTS', (1, 200))
    result = latent_surgery.analyse(of(copying_model(1)),
                                    latent_surgery.Config(sequences=30, search=4, most=400))
    n = result.dimensions[1]
    assert result.accuracy > 0.97 and result.counts[1][-1] == n <= 80
    assert result.left[1]['random'][-1] < 0.15 and result.needed[1]['random'] == n
    assert 'layer' in latent_surgery.table(result)
    model = copying_model(1)
    layer = latent_surgery.Layer(model, 1, copies_of(model))
    other = latent_surgery.Layer(model, 1, other_tokens(model))
    part = torch.zeros(model.config.n_embd, dtype=torch.bool)
    part[112:152] = True  # where head 0.1 writes the token
    assert layer.accuracy(lambda x: torch.where(part, other.read, x), other.targets) > 0.9
    space = latent_surgery.Space(layer.read, torch.eye(model.config.n_embd)[:, part])
    patch = space.held(torch.eye(space.rank), space.white(other.read))
    assert layer.accuracy(patch) < 0.15 and layer.accuracy(patch, other.targets) > 0.9


def other_tokens(model):
    one, other = copies_of(model), copies_of(model, seed=1)
    other.first, other.lag = one.first, one.lag
    other.idx = induction_heads.repeated_tokens(model.config.vocab_size, 20, 32, 7)[:, :32]
    other.idx.scatter_(1, other.queries(), other.idx.gather(1, other.keys()[..., 0]))
    return other


def test_the_steepest_direction_takes_most_trust_away_to_first_order():
    model = copying_model(1).double()
    layer = latent_surgery.Layer(model, 1, copies_of(model))
    space = latent_surgery.Space(
        layer.read, latent_surgery.reading_basis(model.transformer.h[1].attn))
    u = latent_surgery.steepest(layer, space, torch.zeros(space.rank, 0).double())[:, :1]

    @torch.no_grad()
    def fall(V, step=1e-3):
        y = space.white(layer.read)
        more, less = (layer.trust(space.held(V, (1 + sign * step) * y)) for sign in (1, -1))
        return ((more - less) / (2 * step)).item()
    others = space.random(torch.Generator().manual_seed(0))
    assert fall(u) > max(fall(others[:, [i]]) for i in range(20)) and fall(u) > 0


# programs


@pytest.fixture
def run_that_learned(tmp_path):
    """A run of two checkpoints: of a model that has learned nothing, and of one that copies."""
    copying = copying_model(1)
    tokenizer = make_tokenizer(CHARACTERS[:copying.config.vocab_size])
    for iteration, model in ((100, GPT(copying.config).eval()), (200, copying)):
        rows = ''.join(json.dumps({'iter': n, 'val_loss': 4 - n / 100}) + '\n'
                       for n in range(100, iteration + 1, 100))
        save_checkpoint(tmp_path / 'ckpt.pt', model, tokenizer, {}, iteration, keep=5, metrics=rows)
    return tmp_path / 'ckpt.pt'


def test_development_reads_the_checkpoints_of_a_run(run_that_learned, program, tmp_path):
    torch.manual_seed(0)
    out = tmp_path / 'out'
    call = partial(program, lambda: analysis_main('development', development.Config,
                                                  development.analyse, development.table,
                                                  development.plot))
    code, stdout, err = call(run_that_learned, f'--out_dir={out}', '--device=cpu')
    assert code == 0 and 'induction above 0.8: iteration 200' in stdout, err
    found = json.loads((out / 'development.json').read_text())
    assert found['iters'] == [100, 200] and found['losses'] == [3.0, 2.0]
    assert found['scores']['accuracy'][0] < 0.2 and found['scores']['accuracy'][1] > 0.97
    assert found['scores']['previous'][1] > 0.9 and (out / 'development.png').exists()
    (run_that_learned.parent / 'ckpt.pt.1').unlink()
    code, _, err = call(run_that_learned, '--device=cpu')
    assert code == 2 and '--keep_checkpoints=100' in err and err.count('\n') == 1


def test_development_of_any_score_and_of_a_list_of_checkpoints(run_that_learned, program, tmp_path):
    torch.manual_seed(0)
    call = partial(program, lambda: analysis_main('development', development.Config,
                                                  development.analyse, development.table,
                                                  development.plot))
    paths = [run_that_learned, f'{run_that_learned}.1']
    names = ['induction_heads.scores', 'induction_heads.scores.1.0', 'induction_heads.scores.mean',
             'induction_circuit.accuracy', 'logit_lens.stream.rank.mean']
    code, stdout, err = call(run_that_learned, f'--checkpoints={",".join(map(str, paths))}',
                             f'--scores={",".join(names)}', '--prompt=abcabc',
                             f'--out_dir={tmp_path}')
    assert code == 0, err
    scores = json.loads((tmp_path / 'development.json').read_text())['scores']
    for i, path in enumerate(reversed(paths)):
        s = load_subject(path, 'cpu')
        own = induction_heads.analyse(s, induction_heads.Config()).scores
        for name, wanted in zip(names, (own.max(), own[1, 0], own.mean())):
            assert scores[name][i] == pytest.approx(wanted, abs=1e-5)
    assert scores['induction_heads.scores'][1] > 0.9 > 0.3 > scores['induction_heads.scores'][0]
    assert '           200' in next(line for line in stdout.splitlines() if 'accuracy' in line)
    for wrong, words in (('nonsense.x', 'must be ANALYSIS.FIELD'), ('ioi', 'must be'),
                         ('induction_heads.score', "'score' is none of scores, spread"),
                         ('induction_heads.scores.9.9', 'leads to no number'),
                         ('logit_lens.tokens', 'leads to no number')):
        code, _, err = call(run_that_learned, f'--scores={wrong}', '--prompt=abcabc')
        assert code == 2 and words in err and err.count('\n') == 1
    code, _, err = call(run_that_learned, f'--checkpoints={paths[0]},{paths[0]}')
    assert code == 2 and 'two of iteration 200' in err


def test_half_of_the_way():
    assert development.half_way([0, 5, 9], np.array([0.1, 0.2, 0.9])) == 9
    assert development.half_way([0, 5, 9], np.array([0.1, 0.6, 0.9])) == 5
    assert development.half_way([0, 5], np.array([0.9, 0.1])) is None
    assert development.half_way([0, 5], np.array([np.nan, 0.1])) is None


def test_surgery_needs_a_model_that_copies():
    with pytest.raises(UserError, match='config/train_induction.py'):
        latent_surgery.analyse(of(tiny_model(GPT)), latent_surgery.Config(sequences=5))


@pytest.mark.parametrize('analyse, config, words', [
    (induction_circuit.analyse, induction_circuit.Config(), 'n_layer=1'),
    (development.analyse, development.Config(), 'n_layer=1')])
def test_what_one_layer_cannot_do(analyse, config, words):
    with pytest.raises(UserError, match=words):
        analyse(of(tiny_model(GPT, n_layer=1)), config)
