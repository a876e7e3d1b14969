import json
import time
from dataclasses import dataclass

import pytest
import torch
from conftest import CHARS, tiny_model

import bench
import bench_models
import bench_race
import bench_train
from evaluate import split_loss
from model import GPT, GPTConfig
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from models import MODELS, VARIANTS, Entry
from runtime.checkpoint import save_checkpoint
from runtime.dataset import open_data
from runtime.tokenizer import gpt2_encoding, make_tokenizer

TINY = ['decode', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=32', '--vocab_size=50',
        '--device=cpu', '--rounds=1', '--contexts=4']

# A stand-in for a nanoGPT checkout: what bench.py touches of its model.py, on top of our GPT.
PEER = '''
from dataclasses import dataclass
import torch, model

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**vars(config)))
        print('number of parameters: 1')

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx[:, -self.config.block_size:])[0][:, -1:].argmax(-1)), 1)
        return idx
'''


def test_decode_measures_all_in_one_run(tmp_path, program):
    (tmp_path / 'model.py').write_text(PEER)
    code, out, err = program(bench.main, *TINY, '--contexts=1,20', '--new_tokens=15',
                             f'--against={tmp_path},transformers', '--batch_size=3', '--json=True')
    assert code == 0, err
    report = json.loads(out)
    rows = {(row['context'], row['model']): row for row in report['rows']}
    names = ('MHA', 'GQA', 'MLA', 'MLA decoupled', 'MHA rotary', 'GQA rotary', 'MLA rotary',
             'nanoGPT', 'transformers')
    assert set(rows) == {(n, name) for n in (1, 20) for name in names}
    for row in rows.values():
        assert row['tokens_per_second'] > 0 and row['first_token_seconds'] > 0
    # block_size leaves 12 behind the 20
    assert [rows[n, 'MHA']['new_tokens'] for n in (1, 20)] == [15, 12]
    for n, length in ((1, 16), (20, 32)):
        # layers, rows, tokens, k and v, n_embd, bytes
        assert rows[n, 'MHA']['cache_bytes'] == 2 * 3 * length * 2 * 16 * 4
        for label in ('MLA', 'MLA decoupled', 'MLA rotary'):
            assert rows[n, label]['cache_bytes'] * 4 == rows[n, 'MHA']['cache_bytes']
        # two heads: one of keys and values is the least
        assert rows[n, 'GQA']['cache_bytes'] * 2 == rows[n, 'MHA']['cache_bytes']
        assert rows[n, 'nanoGPT']['cache_bytes'] is None
    assert report['settings']['n_latent'] == 8


def test_decode_prints_a_table(program):
    code, out, err = program(bench.main, *TINY, '--new_tokens=3', '--dtype=bfloat16',
                             '--models=mha,mla')
    assert code == 0 and 'bfloat16' in out and out.count('MLA') == 2, err
    assert ' MHA ' in out and '1.00x' in out and '0.00 MB' in out


def test_a_new_attention_is_measured_once_it_is_in_the_registry(program, monkeypatch):
    @dataclass
    class ToyConfig(GPTConfig):
        n_toys: int = 1  # a key that no other model has

    class Toy(GPT):
        model_type, config_class = 'toy', ToyConfig

    monkeypatch.setitem(MODELS, 'toy', Entry(Toy, 'Toy', 'C3'))
    code, out, err = program(bench.main, *TINY, '--new_tokens=3', '--n_toys=2', '--json')
    assert code == 0, err
    report = json.loads(out)
    known = ['MHA', 'GQA', 'MLA', 'MLA decoupled', 'MHA rotary', 'GQA rotary', 'MLA rotary']
    assert [row['model'] for row in report['rows']] == [*known, 'Toy']
    assert report['settings']['n_toys'] == 2 and report['settings']['n_latent'] == 8
    names = [name for name, *_ in bench_train.step_contenders({'n_toys': 3})]
    assert names == [*known, 'Toy', 'k-ahead', 'k-ahead, linear heads']


@pytest.mark.parametrize('option, words', [
    ('--models=mha,mqa', "models='mha,mqa' must be some of mha, gqa"),
    ('--rotary=all', "rotary='all' is what the variants differ in")])
def test_variants_are_chosen_by_name(option, words, program):
    for command in ('decode', 'train'):
        code, _, err = program(bench.main, command, *TINY[1:-2], option)
        assert code == 2 and words in err and err.count('\n') == 1, err


def test_prepare_counts_tokens_and_names_what_is_missing(program, tmp_path):
    source = tmp_path / 'corpus.jsonl'
    documents = [f'document {i} of a few' for i in range(40)]
    source.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    code, out, err = program(bench.main, 'prepare', f'--source={source}', '--rounds=1',
                             '--workers=1')
    assert code == 0, err
    tokens = sum(len(gpt2_encoding().encode_ordinary(text)) + 1 for text in documents)
    assert f' {tokens} tokens' in out
    for args in (['--source=none.jsonl'], ['--against=nowhere']):
        code, _, err = program(bench.main, 'prepare', *args)
        assert code == 2 and err.count('\n') == 1 and args[0].split('=')[1] in err


def test_train_shows_that_four_heads_need_hardly_more_memory(program, monkeypatch):
    """With logits of 67 MB, which four heads at once would make 268."""
    args = ['train', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=256',
            '--vocab_size=16384', '--batch_size=4', '--device=cpu', '--steps=1', '--json']
    monkeypatch.setattr(bench_models, 'VARIANTS', {key: VARIANTS[key] for key in ('mha', 'mla')})
    code, out, err = program(bench.main, *args)
    assert code == 0, err
    rows = {row['model']: row for row in json.loads(out)['rows']}
    assert set(rows) == {'MHA', 'MLA', 'k-ahead', 'k-ahead, linear heads'}
    assert rows['MHA']['peak_bytes'] > 67e6
    for row in rows.values():
        assert row['peak_bytes'] < 1.3 * rows['MHA']['peak_bytes']
        assert row['tokens_per_second'] * row['ms_per_step'] == pytest.approx(4 * 256 * 1e3)


def save_k_ahead(path, **settings):
    model = tiny_model(GPT_KAhead, **settings)
    save_checkpoint(path, model, make_tokenizer(CHARS), {}, 1)


def test_train_measures_the_parts_of_a_step_beside_nanogpts(tmp_path, program):
    (tmp_path / 'model.py').write_text(PEER)
    args = ['train', *TINY[1:-2], '--steps=2', '--rounds=2', '--models=mla',
            f'--against={tmp_path}', '--optimizer=muon']
    code, out, err = program(bench.main, *args, '--json')
    assert code == 0, err
    report = json.loads(out)
    assert [row['model'] for row in report['rows']] == ['MLA', 'nanoGPT']
    for row in report['rows']:
        parts = [row[f'{part}_ms'] for part in ('data', 'forward', 'backward', 'optimizer')]
        assert min(parts) > 0 and sum(parts) == pytest.approx(row['ms_per_step'], rel=0.5)
        # 32 tokens in a step
        assert row['tokens_per_second'] * row['ms_per_step'] == pytest.approx(32 * 1e3)
        model_class = {'MLA': GPT_MLA, 'nanoGPT': GPT}[row['model']]
        model = model_class(model_class.config_class(32, 50, 2, 2, 16))
        flops = model.flops_per_token() * row['tokens_per_second']
        assert row['share_of_product'] * report['product_flops'] == pytest.approx(flops)
    code, out, err = program(bench.main, *args, '--rounds=1')
    assert code == 0 and 'against MLA' in out and ', muon; median of 2' in out, err


def test_the_fastest_product_is_near_what_this_machine_does():
    flops = bench_train.fastest_product(torch.device('cpu'), torch.float32, size=256)
    assert 1e8 < flops < 1e14


def test_k_ahead_measures_a_checkpoint(tmp_path, data_dir, program):
    save_k_ahead(tmp_path / 'ckpt_k_ahead.pt')
    args = [f'--dataset={data_dir}', '--prompts=5', '--batch_size=2', '--new_tokens=12',
            '--prompt_tokens=4', '--device=cpu']
    code, out, err = program(bench.main, 'k-ahead', f'--out_dir={tmp_path}', *args, '--json')
    assert code == 0, err
    result = json.loads(out)
    assert result['same_texts'] == 5
    assert 1 <= result['tokens_per_pass'] == 1 + sum(result['guesses_that_stood']) <= 4
    rate, slow_rate = result['tokens_per_second'], result['one_at_a_time_tokens_per_second']
    assert result['speed_up'] == rate / slow_rate
    for source in (tmp_path / 'ckpt_k_ahead.pt', f'--model={tmp_path}'):
        code, out, err = program(bench.main, 'k-ahead', source, *args)
        assert code == 0 and 'guess of head 4 stood' in out and '5 of 5 prompts' in out, err


@pytest.mark.parametrize('args, words', [
    (['--prompts=0'], 'prompts=0 must be at least 1'), (['--dataset=nowhere'], 'dataset=nowhere'),
    (['--out_dir=nowhere'], 'there is no checkpoint'),
    (['nowhere'], 'there is no checkpoint'),
    (['--prompt_tokens=16'], 'leaves no room to guess in block_size=16'),
    (['--temperature=1e-9'], 'must be 0 or at least 0.001'),
    (['--dataset='], 'does not name the data'), (['--temperature=-1'], 'temperature=-1')])
def test_bad_input_to_k_ahead(args, words, tmp_path, data_dir, program):
    save_k_ahead(tmp_path / 'ckpt_k_ahead.pt')
    code, out, err = program(bench.main, 'k-ahead', f'--out_dir={tmp_path}',
                             f'--dataset={data_dir}', '--device=cpu', *args)
    assert code == 2 and words in err and err.count('\n') == 1 and out == ''


def test_k_ahead_needs_several_heads(tmp_path, data_dir, program):
    save_k_ahead(tmp_path / 'ckpt_k_ahead.pt', k_ahead=1)
    code, _, err = program(bench.main, 'k-ahead', f'--out_dir={tmp_path}',
                           f'--dataset={data_dir}', '--device=cpu')
    assert code == 2 and 'of one head' in err and err.count('\n') == 1


def test_passes_are_counted_whoever_makes_them():
    """A model of known slowness: the measured rate is that of its passes."""
    class Slow(torch.nn.Module):
        def forward(self, idx):
            time.sleep(0.05 if idx.size(1) > 1 else 0.01)

    model = Slow()

    def decode(idx, n):
        model(idx)
        for _ in range(n - 1):
            model(idx[:, :1])
    contender = bench.Contender('slow', [model], decode, None)
    first, rate = bench.time_decoding(contender, torch.zeros(4, 9), 6)
    assert 0.05 <= first < 0.1 and 0.4 * 4 / 0.01 < rate <= 4 / 0.01 and not model._forward_hooks


def test_compiled_models_stand_beside_themselves(program, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **_: compile(f, backend='eager'))
    passes = []
    monkeypatch.setattr(bench.PassTimes, '__del__', lambda note: passes.append(len(note.times)),
                        raising=False)
    code, out, err = program(bench.main, *TINY, '--new_tokens=9', '--models=mha,mla', '--compile')
    assert code == 0 and 'MHA, compiled' in out and 'MLA, compiled' in out, err
    assert passes == [10] * 4  # the start, the prompt's pass and eight more


@pytest.mark.parametrize('args, words', [
    ([], "what to measure is ''"), (['training'], "what to measure is 'training'"),
    (['train', '--n_layer=1'], 'n_layer=1 must be at least 2'),
    (['train', '--k_ahead=0'], 'k_ahead=0'), (['train', '--steps=0'], 'steps=0'),
    (TINY + ['--contexts=a'], "contexts='a'"), (TINY + ['--contexts='], "contexts=''"),
    (TINY + ['--contexts=31'], 'between 1 and block_size - 2 = 30'),
    (TINY + ['--against=nowhere'], "against='nowhere'"),
    (TINY + ['--new_tokens=1'], 'new_tokens=1 must be at least 2'),
    (TINY + ['--n_head=3'], 'not divisible'), (TINY + ['--context=3'], 'did you mean contexts?')])
def test_bad_input(args, words, program):
    code, out, err = program(bench.main, *args)
    assert code == 2 and words in err and err.count('\n') == 1 and out == ''


def test_another_program_is_no_nanogpt(tmp_path, program):
    (tmp_path / 'model.py').write_text('x = 1')
    code, _, err = program(bench.main, *TINY, f'--against={tmp_path}')
    assert code == 2 and "is not nanoGPT's (AttributeError" in err and err.count('\n') == 1


def test_race_takes_the_first_checkpoint_that_is_good_enough(program, tmp_path, tiny_args):
    """Against a program that leaves a bad checkpoint at once, and ours after a second."""
    settings = [arg.lstrip('-') for arg in tiny_args[3:]]
    (tmp_path / 'config.py').write_text('\n'.join(settings))
    other = tmp_path / 'other'
    other.mkdir()
    save_checkpoint(other / 'bad.pt', tiny_model(GPT), make_tokenizer(CHARS), {}, 1)
    data = tiny_args[0].split('=')[1]
    good = split_loss(tiny_model(GPT), open_data(data).val)
    (other / 'train.py').write_text('''
import shutil, sys, time
assert 'manual_seed(1337' == 'manual_seed(7'  # it has been replaced
out = next(a for a in sys.argv if a.startswith('--out_dir=')).split('=')[1]
shutil.copy('bad.pt', out + '/ckpt.pt')
time.sleep(1)
''')
    args = ['race', f'--config={tmp_path / "config.py"}', f'--dataset={data}', '--seeds=7',
            '--json', f'--against={other}']
    for target, reached in ((good + 0.1, [True, True]), (good - 0.01, [True, False])):
        code, out, err = program(bench.main, *args, f'--target={target}')
        assert code == 0, err
        rows = json.loads(out)['rows']
        assert [row['reached'] for row in rows] == reached
        assert rows[1]['val_loss'] == pytest.approx(good)
        assert (rows[1]['seconds'] < 1) == reached[1] and rows[1]['seed'] == 7
    last_words = f"import shutil; shutil.copy('{other}/bad.pt', '{tmp_path}/ckpt.pt')"
    checkpoints, seconds = bench_race.watch(['-c', last_words], tmp_path, tmp_path)
    assert [at <= seconds for at, _ in checkpoints] == [True]  # it ended at once
    for bad in (['--seeds=a'], ['--config=none.py'], ['--against=nowhere']):
        code, _, err = program(bench.main, *args, *bad)
        assert code == 2 and err.count('\n') == 1 and bad[0].split('=')[1] in err


def test_every_subcommand_has_a_help_of_its_own(program):
    code, out, _ = program(bench.main, '--help')
    assert code == 0 and all(f'bench.py {name}' in out for name in bench.COMMANDS)
    for name, key in (('decode', 'contexts'), ('train', 'steps'), ('k-ahead', 'prompts'),
                      ('prepare', 'workers'), ('race', 'target')):
        code, out, _ = program(bench.main, name, '--help')
        assert code == 0 and out.startswith('Measure') and f'python bench.py {name} ' in out
        assert 'It needs' in out and f'--{key}=' in out and out.count('Measure ') == 1
