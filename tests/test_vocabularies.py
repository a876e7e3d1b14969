"""Bins of random ids of each kind of vocabulary, from the trainer to text and figures. What is not
known is nowhere assumed."""

import json
import math
from dataclasses import fields
from importlib import import_module

import numpy as np
import pytest
from conftest import save_hugging_face, tiny_model
from test_tokenizer import learned

import evaluate
import export_huggingface
import sample
import train
from analysis import NAMES
from analysis.subject import load_subject
from model import GPT
from model_mla import GPT_MLA
from runtime.dataset import open_data, write_splits
from runtime.loading import load_model
from runtime.tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures('no_picture')
WORDS = [f'w{i}' for i in range(70_000)]
SPECS = {'characters': list('\n abc'), 'without line breaks': list('ACGT'), 'words': ['the', 'cat'],
         'bytes': [bytes([i]) for i in range(256)], 'gpt2': 'gpt2', 'many words': WORDS,
         'byte pairs': {'bpe': learned().to_str()}, 'unknown': {'unknown': 1500},
         'no record': None}


@pytest.fixture
def trained(tiny_args, tmp_path, program):
    """A function: the name of a spec -> folders of random ids and of a model trained on them, and
    what the trainer said."""
    def make(name, model_class=GPT):
        spec, folder = SPECS[name], tmp_path / 'bins'
        folder.mkdir()
        tokenizer = make_tokenizer(spec or {'unknown': 300})
        rng = np.random.default_rng(0)
        train_ids, val_ids = (rng.integers(tokenizer.n_vocab, size=n) for n in (400, 200))
        write_splits(folder, train_ids, val_ids, tokenizer)
        if spec is None:
            (folder / 'meta.json').unlink()
        args = [*tiny_args, f'--dataset={folder}', '--max_iters=1', '--eval_iters=1',
                '--eval_interval=1', '--sample_interval=1']
        code, out, err = program(lambda: train.main(model_class), *args)
        assert code == 0, err
        return folder, tmp_path / 'out', out
    return make


@pytest.mark.parametrize('name', SPECS)
def test_from_bins_to_text_and_figures(name, trained, tmp_path, program):
    folder, out_dir, said = trained(name)
    spec = SPECS[name] or {'unknown': None}
    data, model = open_data(folder), load_model(out_dir)
    assert model.tokenizer.spec == data.tokenizer.spec == spec
    n_vocab = data.tokenizer.n_vocab
    padded = {'gpt2': 50304, 'no record': 50304}.get(name, n_vocab)
    assert model.model.config.vocab_size == padded and 'sample at step 1' in said
    assert ('does not say what its ids mean' in said) == (name in ('unknown', 'no record'))

    args = [out_dir, '--device=cpu', '--num_samples=2', '--max_new_tokens=20', '--json']
    code, out, err = program(sample.main, *args)
    assert code == 0, err
    assert ('no line break' in err) == (name in ('without line breaks', 'words', 'many words',
                                                 'unknown', 'no record'))
    for row in map(json.loads, out.splitlines()):
        assert max(row['tokens']) < n_vocab and len(row['tokens']) == 20
        if 'unknown' in spec:
            assert [int(word) for word in row['text'].split()] == row['tokens']
        elif name == 'characters':
            assert row['text'] == ''.join(spec[i] for i in row['tokens'])
        elif 'words' in name:
            assert row['text'].split() == [spec[i] for i in row['tokens']]

    code, out, err = program(evaluate.main, out_dir, '--device=cpu', '--json')
    result = json.loads(out)
    assert code == 0 and abs(result['loss'] - math.log(padded)) < 0.5
    knows = name in ('characters', 'without line breaks', 'bytes', 'gpt2', 'byte pairs')
    assert ('bytes' in result) == ('bits_per_byte' in result) == knows
    if knows:
        end = data.tokenizer.end_of_text
        ids = [i for i in data.val[1:].tolist() if i != end]
        assert result['bytes'] == sum(len(data.tokenizer.to_bytes([i])) for i in ids)
    text = program(evaluate.main, out_dir, '--device=cpu')[1]
    assert ('bytes unknown for' in text) == (not knows)


@pytest.mark.parametrize('name', SPECS)
def test_an_export_has_the_tokenizer_that_is_known(name, trained, tmp_path, program):
    _, out_dir, _ = trained(name)
    source, target = load_model(out_dir), tmp_path / 'hf'
    code, out, err = program(export_huggingface.main, out_dir, target)
    assert code == 0, err
    written = {path.name for path in target.iterdir()}
    assert ('tokenizer.json' in written) == (name in ('characters', 'without line breaks', 'gpt2',
                                                      'byte pairs'))
    assert ('no tokenizer files' in out) == ('tokenizer.json' not in written)
    exported = load_model(target)
    if 'tokenizer.json' in written:
        assert exported.tokenizer == source.tokenizer
        from transformers import AutoTokenizer
        peer, text = AutoTokenizer.from_pretrained(target), 'To be, or not to be: café'
        if isinstance(SPECS[name], list):
            text = ''.join(SPECS[name]) * 3
        assert peer(text)['input_ids'] == exported.tokenizer.encode(text)
    else:
        assert exported.tokenizer.spec == {'unknown': source.model.config.vocab_size}
    end = json.loads((target / 'config.json').read_text())['eos_token_id']
    assert end == source.tokenizer.end_of_text


@pytest.mark.parametrize('name', ['words', 'unknown', 'byte pairs'])
def test_analyses_of_a_model_whose_ids_are_no_characters(name, trained):
    """They read bins, or a prompt in the form that the vocabulary has."""
    folder, out_dir, _ = trained(name, GPT_MLA)
    subject = load_subject(out_dir, 'cpu')
    prompt = subject.tokenizer.decode(open_data(folder).val[:4].tolist())
    for part in set(NAMES) - {'ioi', 'report', 'similarity', 'latent_surgery', 'development'}:
        module = import_module(f'analysis.{part}')
        settings = {'prompt': prompt, 'max_tokens': 64, 'sequences': 2}
        known = {f.name for f in fields(module.Config)}
        config = module.Config(**{key: settings[key] for key in settings.keys() & known})
        if name == 'words' and part == 'induction_heads':
            continue  # two words are too few for random sequences
        result = module.analyse(subject, config)
        assert module.table(result)


def test_a_hugging_face_directory_says_what_its_ids_are(tmp_path):
    save_hugging_face(tiny_model(GPT, vocab_size=50304), tmp_path / 'gpt2')
    assert load_model(tmp_path / 'gpt2').tokenizer.spec == 'gpt2'
    (tmp_path / 'gpt2' / 'vocab.json').unlink()
    assert load_model(tmp_path / 'gpt2').tokenizer.spec == {'unknown': 50304}
    learned().save(str(tmp_path / 'gpt2' / 'tokenizer.json'))
    assert load_model(tmp_path / 'gpt2').tokenizer == make_tokenizer(SPECS['byte pairs'])
    (tmp_path / 'gpt2' / 'tokenizer.json').write_text('{')
    assert load_model(tmp_path / 'gpt2').tokenizer.spec == {'unknown': 50304}
