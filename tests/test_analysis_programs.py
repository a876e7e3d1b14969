"""The programs: each runs from a checkpoint, saves a picture and its numbers, and says in one line
what it cannot do."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

from configurator import UserError

import numpy as np
import pytest
import torch
from analysis_models import random_model, subject
from conftest import CHARS, save_hugging_face, tiny_model

from analysis import NAMES, __main__, report
from analysis import subject as subject_module
from analysis.plots import Panel, draw_panels, token_labels
from analysis.program import as_json, main
from analysis.subject import load_subject, text_tokens
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.record import write_record
from runtime.tokenizer import make_tokenizer

# latent_surgery and development want models that have learned to copy: test_circuits_that_copy.py
SINGLE = [name for name in NAMES if name not in ('report', 'similarity', 'latent_surgery',
                                                 'development')]
TEXT = ('ablation', 'induction_in_text', 'similarity', 'spectrum', 'token_loss')
PROMPTS = {'logit_lens': {'prompt': 'Mary and John'}, 'attribution': {'prompt': 'Mary and John'},
           'patching': {'clean': 'Mary and John', 'corrupted': 'John and John'}}


@pytest.fixture
def checkpoint(tmp_path, data_dir):
    """Save a random model as the trainer would, and return the path."""
    def make(model_class, name='ckpt.pt', **settings):
        path = tmp_path / name
        save_checkpoint(path, random_model(model_class, **settings), make_tokenizer(CHARS),
                        {'dataset': str(data_dir)}, 0)
        return path
    return make


def entry(name):
    module = importlib.import_module(f'analysis.{name}')
    if name == 'report':
        return module.main
    return lambda: main(name, module.Config, module.analyse, module.table, module.plot,
                        getattr(module, 'plot_prompt', None))


def saved(out_dir, name):
    assert (out_dir / f'{name}.png').read_bytes()[1:4] == b'PNG'
    return json.loads((out_dir / f'{name}.json').read_text())


@pytest.mark.parametrize('name', [name for name in SINGLE if name != 'ioi'])
def test_the_trunk_of_a_k_ahead_model_gives_the_numbers_of_the_ordinary_model(name, data_dir):
    module = importlib.import_module(f'analysis.{name}')
    ordinary = random_model(GPT_MLA, n_latent=6)
    text = {'text': str(data_dir)} if name in TEXT else {}
    text |= {key: 'abc' + 'ae'[key == 'corrupted'] for key in PROMPTS.get(name, {})}
    one, two = (as_json(module.analyse(subject(model), module.Config(**text)))
                for model in (ordinary, GPT_KAhead.from_gpt(ordinary, k_ahead=3)))
    assert one == two


@pytest.fixture(scope='module')
def published_forms(tmp_path_factory):
    """The same weights in a Hugging Face directory and in nanoGPT's checkpoint."""
    folder = tmp_path_factory.mktemp('published')
    model = random_model(GPT, vocab_size=50257)
    save_hugging_face(model, folder / 'hf')
    args = {key: getattr(model.config, key) for key in
            ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    torch.save({'model': model.state_dict(), 'model_args': args, 'iter_num': 1,
                'best_val_loss': 9.0, 'config': {'dataset': 'openwebtext'}}, folder / 'ckpt.pt')
    return [load_subject(str(folder / source), 'cpu') for source in ('hf', 'ckpt.pt')]


@pytest.mark.parametrize('name', [name for name in SINGLE if name not in
                                  ('ioi', 'latent_directions')])
def test_gpt2s_published_form_is_taken_apart(name, published_forms, data_dir):
    """A Hugging Face directory and nanoGPT's checkpoint of the same weights give the same
    numbers."""
    write_record(data_dir, make_tokenizer('gpt2'))
    module = importlib.import_module(f'analysis.{name}')
    given = {'text': str(data_dir), 'max_tokens': 160} if name in TEXT else {}
    config = module.Config(**given, **PROMPTS.get(name, {}))
    one, two = (module.analyse(s, config) for s in published_forms)
    for (key, mine), theirs in zip(as_json(one).items(), as_json(two).values()):
        mine, theirs = (np.array(list(flat(value)), dtype=float) for value in (mine, theirs))
        assert mine == pytest.approx(theirs, abs=5e-3, nan_ok=True), key


def flat(value):
    """The numbers in a result as_json."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    elif value is None or isinstance(value, float):
        yield np.nan if value is None else value


@pytest.mark.parametrize('name', [name for name in SINGLE if name != 'ioi'])
def test_each_program_saves_a_picture_and_its_numbers(name, checkpoint, program, tmp_path):
    path, out = checkpoint(GPT_MLA, n_layer=12), tmp_path / 'analysis'
    code, stdout, stderr = program(entry(name), f'--model={path}', f'--out_dir={out}')
    assert code == 0, stderr
    assert stdout.startswith('GPT_MLA: 12 layers') and f'{name}.png and {name}.json' in stdout
    assert max(len(line) for line in stdout.splitlines()) < 160 and stdout.count('\n') < 45
    numbers = saved(out, name)
    assert numbers['settings']['model'] == str(path)
    if name == 'induction_heads':
        assert np.shape(numbers['scores']) == (12, 2)


def test_ioi_and_induction_from_a_hugging_face_directory(program, tmp_path):
    save_hugging_face(random_model(GPT, vocab_size=50257, block_size=64), tmp_path / 'hf')
    options = [tmp_path / 'hf', f'--out_dir={tmp_path / "a"}']
    code, stdout, stderr = program(entry('ioi'), *options, '--prompts=4', '--patch_prompts=2')
    assert code == 0, stderr
    numbers = saved(tmp_path / 'a', 'ioi')
    assert np.shape(numbers['restored']) == (2, 2, 6) and 'IO preferred in' in stdout
    code, *_ = program(entry('induction_heads'), *options, '--sequences=2')
    assert code == 0


def test_a_prompt_is_drawn_with_the_heads_asked_for(checkpoint, program, tmp_path):
    options = [f'--model={checkpoint(GPT)}', f'--out_dir={tmp_path / "a"}', '--prompt=abc abc']
    code, stdout, stderr = program(entry('attention_patterns'), *options, '--heads=1.0,0.1')
    assert code == 0 and 'attention_patterns_prompt.png' in stdout, stderr
    assert (tmp_path / 'a' / 'attention_patterns_prompt.png').exists()
    numbers = saved(tmp_path / 'a', 'attention_patterns')
    patterns = numbers['prompt_patterns']
    assert numbers['prompt_tokens'] == list('abc␣abc') and list(patterns) == ['0.1', '1.0']
    assert np.sum(patterns['0.1'], axis=1) == pytest.approx(np.ones(7), abs=1e-4)


def test_each_model_has_a_folder_of_its_own(checkpoint, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('ckpt.pt', 'ckpt_mla.pt'):
        program(entry('induction_heads'), f'--model={checkpoint(GPT, name)}')
    found = sorted(map(str, (tmp_path / 'out_analysis').glob('**/*.json')))
    assert found == [f'{tmp_path}/out_analysis/{name}/induction_heads.json'
                     for name in ('ckpt', 'ckpt_mla')]


@pytest.mark.parametrize('other', [GPT, GPT_KAhead])
def test_similarity_of_two_checkpoints(other, checkpoint, program, tmp_path):
    one, two = checkpoint(GPT_MLA), checkpoint(other, 'other.pt', n_layer=3, n_embd=24, n_head=3)
    code, stdout, stderr = program(entry('similarity'), one, two, f'--out_dir={tmp_path / "a"}')
    assert code == 0, stderr
    numbers = saved(tmp_path / 'a', 'similarity')
    assert np.shape(numbers['residual']) == (3, 4) and np.shape(numbers['heads']) == (4, 9)
    assert len(numbers['matches']) == 4


def test_report_is_one_file_with_all_that_can_be_asked(checkpoint, program, tmp_path):
    mha, mla, out = checkpoint(GPT), checkpoint(GPT_MLA, 'ckpt_mla.pt'), tmp_path / 'report'
    code, stdout, stderr = program(report.main, mha, mla, f'--out_dir={out}')
    assert code == 0, stderr
    page = (out / 'report.html').read_text()
    assert len(report.PARTS) == len(NAMES) - 3
    # ioi has nothing to show; the residual streams and samples come behind the parts
    assert page.count('<h2') == len(report.PARTS) - 1 + 2
    assert page.count('data:image/png;base64,') == len(report.PARTS) - 1 + 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing but itself
    assert 'ioi for MHA: ioi needs' in stdout and 'latent_directions for MHA: ' in stdout
    assert page.index('latent_directions for MHA: latent_directions needs') > page.index('Left out')
    numbers = saved(out, 'induction_heads')
    assert np.shape(numbers['MHA']['scores']) == np.shape(numbers['MLA']['scores']) == (2, 2)
    assert list(saved(out, 'latent_directions')) == ['settings', 'models', 'MLA']
    assert numbers['models'] == {'MHA': str(mha), 'MLA': str(mla)}


def test_report_of_two_models_of_one_kind(checkpoint, program, tmp_path, monkeypatch):
    # the test above looks at pictures
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda _, path: path.write_bytes(b''))
    one, two, out_dir = checkpoint(GPT), checkpoint(GPT, 'b.pt'), f'--out_dir={tmp_path / "r"}'
    code, _, stderr = program(report.main, f'--model={one}', f'--other={two}', out_dir)
    assert code == 0, stderr
    code, _, stderr = program(report.main, f'--model={one}', f'--other={one}', out_dir)
    assert code == 2 and 'is the same as model' in stderr


def test_each_pair_of_models_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('out', 'gpt2-local'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'gpt2-local' / 'config.json').touch()
    (tmp_path / 'out' / 'ckpt.pt').touch()
    names = {
        ('quick/ckpt.pt', 'quick/ckpt_mla.pt'): 'quick/ckpt.pt-vs-ckpt_mla.pt',
        ('out', 'out_mla/ckpt_mla.pt'): 'out+ckpt.pt-vs-out_mla+ckpt_mla.pt',
        ('./out/ckpt.pt', 'gpt2-local'): 'out+ckpt.pt-vs-gpt2-local',
        ('a.pt', str(tmp_path / 'b.pt')): 'a.pt-vs-b.pt'}
    for pair, name in names.items():
        assert report.pair_folder(*pair) == Path('out_report') / name
    # paths that would be alike if their parts were only joined
    alike = ['a/b.pt', 'a+b.pt', '../a/b.pt', '/a/b.pt', '%2F/a/b.pt', 'a-vs.pt', 'a', 'a-vs-a',
             'a b.pt', 'a%20b.pt', 'vs', '%76s', '\udcff.pt', 'é.pt']
    for path in alike:
        Path(path).touch() if '/' not in path else None
    pairs = [(one, two) for one in alike for two in alike]
    folders = {report.pair_folder(*pair) for pair in pairs}
    assert len(folders) == len(pairs)
    assert all('..' not in folder.parts and not folder.is_absolute() for folder in folders)


def test_a_report_goes_to_the_folder_of_its_pair(checkpoint, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, 'PARTS', {'induction_heads': 'text'})
    one, two = checkpoint(GPT), checkpoint(GPT_MLA, 'ckpt_mla.pt')
    for pair in ((one, two), (two, one)):
        assert program(report.main, *pair)[0] == 0
    found = sorted(path.parent.name for path in Path('out_report').glob('*/report.html'))
    assert found == ['ckpt.pt-vs-ckpt_mla.pt', 'ckpt_mla.pt-vs-ckpt.pt']


@pytest.mark.parametrize('arguments', [[], ['--help'], ['-h']])
def test_the_list_has_a_line_for_each(arguments, program):
    code, stdout, _ = program(__main__.main, *arguments)
    assert 'python -m analysis.copying out/ckpt.pt' in stdout
    lines = [line for line in stdout.splitlines() if line.startswith('  ')]
    assert code == 0 and [line.split()[0] for line in lines] == list(NAMES)
    assert all(len(line.split()) > 4 and len(line) < 130 for line in lines)


@pytest.mark.parametrize('command', [['-m', 'analysis.copying'], ['analysis/copying.py']])
def test_help_explains_an_analysis_however_it_is_started(command):
    ran = subprocess.run([sys.executable, *command, '--help'], cwd=Path(report.__file__).parents[1],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith('Do heads copy what they read?')
    assert 'python -m analysis.copying out/ckpt.pt' in ran.stdout and '--model=' in ran.stdout


@pytest.mark.parametrize('name', NAMES)
def test_every_analysis_has_an_example(name):
    module = importlib.import_module(f'analysis.{name}')
    assert f'    python -m analysis.{name} ' in module.__doc__ and 'needs' in module.__doc__


@pytest.mark.parametrize('name, options, words', [
    ('induction_heads', [], ['model is empty']),
    ('induction_heads', ['--model=nowhere.pt'], ['nowhere.pt', 'no checkpoint']),
    ('induction_heads', ['--model=CKPT', '--sequences=0'], ['sequences=0', 'at least 1']),
    ('induction_heads', ['--model=CKPT', '--lenght=9'], ['lenght', 'length']),
    ('induction_heads', ['--model=CKPT', '--out_dir=CKPT/x'], ['out_dir=', 'give another']),
    ('attention_patterns', ['--model=CKPT', '--prompt=abc', '--heads=7.7'], ["heads='7.7'", '1.1']),
    ('attention_patterns', ['--model=CKPT', '--prompt=XYZ'], ['prompt', "'X'"]),
    ('attention_patterns', ['--model=CKPT', '--prompt=' + 6 * 'abc'],
     ['18 tokens', 'block_size=16']),
    ('composition', ['--model=ONE_LAYER'], ['n_layer=1']),
    ('ioi', ['--model=CKPT'], ['one token', 'GPT-2']),
    ('latent_directions', ['--model=CKPT'], ['give an MLA model']),
    ('latent_directions', ['--model=CKPT', '--alone=0.3'], ['alone=0.3']),
    ('attention_patterns', ['--model=CKPT', '--heads=0.1'], ['heads=', 'prompt']),
    ('ablation', ['--model=CKPT', '--max_tokens=5'], ['max_tokens']),
    ('similarity', ['--model=CKPT', '--other=CKPT', '--max_tokens=20'], ['max_tokens=32']),
    ('report', ['--model=CKPT', '--other=ONE_LAYER', '--text=nonsense'], ['nonsense']),
    ('report', ['--model=CKPT', '--other=CKPT'], ['is the same as']),
    ('ablation', ['--model=CKPT', '--text=FILE:none.txt'],
     ['text=FILE:none.txt', 'cannot be read']),
    ('ablation', ['--model=CKPT', '--text=nonsense'], ['nonsense']),
    ('spectrum', ['--model=CKPT', '--text=nonsense'], ['nonsense']),
    ('similarity', ['--model=CKPT'], ['other is empty']),
    ('report', ['--model=CKPT'], ['other is empty']),
])
def test_a_mistake_is_one_line(name, options, words, checkpoint, program, tmp_path):
    paths = {'CKPT': checkpoint(GPT), 'ONE_LAYER': checkpoint(GPT, 'one.pt', n_layer=1)}
    for short, path in paths.items():
        options = [option.replace(short, str(path)) for option in options]
    code, _, stderr = program(entry(name), f'--out_dir={tmp_path / "a"}', *options)
    assert code == 2 and stderr.count('\n') == 1, stderr
    assert all(word in stderr for word in words), stderr


def test_weights_that_are_not_finite_are_refused(tmp_path, program):
    model = random_model(GPT)
    model.transformer.h[1].attn.c_proj.weight.data[3, 3] = np.nan
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, model, make_tokenizer(CHARS), {}, 0)
    code, _, stderr = program(entry('spectrum'), f'--model={path}', f'--out_dir={tmp_path}')
    assert code == 2 and stderr.count('\n') == 1 and 'h.1.attn.c_proj.weight' in stderr


def test_the_list_takes_no_names(program, monkeypatch):
    monkeypatch.setattr(__main__.sys, 'argv', ['analysis', 'ioi'])
    with pytest.raises(UserError, match='python -m analysis.NAME'):
        __main__.main()


def test_text_of_a_model_that_names_none(tmp_path, data_dir, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, tiny_model(GPT), make_tokenizer(CHARS), {}, 0)
    s = load_subject(path, 'cpu')
    with pytest.raises(UserError, match='--text='):
        text_tokens(s, '')
    (tmp_path / 'text.txt').write_text('abcabc\nabcabc abc ' * 4)
    assert len(text_tokens(s, f'FILE:{tmp_path / "text.txt"}')[0]) == 4 * 18
    monkeypatch.setattr(subject_module, 'BATCH_TOKENS', 32)
    assert [len(batch) for batch in s.windows(f'FILE:{tmp_path / "text.txt"}', 48, 16)] == [2, 1]
    with pytest.raises(UserError, match='200'):
        s.windows(f'FILE:{tmp_path / "text.txt"}', 48, 199)
    (data_dir / 'meta.pkl').unlink()
    with pytest.raises(UserError, match='does not say what its ids mean.*14 characters'):
        text_tokens(s, str(data_dir))


def test_pictures_of_models_side_by_side_have_one_scale():
    maps = {'MHA': np.array([[0.0, 1]]), 'MLA': np.array([[5.0, np.nan]])}
    figure = draw_panels('title', [Panel('what', maps, 'unit', 0, None),
                                   Panel('other', maps, 'unit', -1, 1)])
    axes = [ax for box in figure.subfigs for ax in box.axes]
    images = [image for ax in axes for image in ax.get_images()]
    assert [image.get_clim() for image in images] == [(0, 5)] * 2 + [(-1, 1)] * 2
    assert [ax.get_title() for ax in axes][:2] == ['what\nMHA', 'what\nMLA']
    figure.canvas.draw()


def test_token_labels_show_white_space():
    assert token_labels(make_tokenizer(list('\n a$')), [0, 1, 2, 3]) == ['↵', '␣', 'a', '$']
