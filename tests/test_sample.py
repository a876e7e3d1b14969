import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import BOTH, CHARS, save_hugging_face, tiny_model
from test_checkpoint import save

import export_huggingface
import generate
import sample
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import checkpoint_path
from runtime.tokenizer import gpt2_encoding

ROOT = Path(sample.__file__).parent


def script(name):
    """The main of a program that is started as python name."""
    return lambda: runpy.run_path(name, run_name='__main__')


@BOTH
def test_samples_without_data_and_the_seed_decides(model_class, tmp_path, program):
    save(checkpoint_path(tmp_path, model_class.model_type), tiny_model(model_class))
    args = [f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=2', '--max_new_tokens=30',
            '--start=ab']
    runs = [program(lambda: sample.main(model_class.model_type), *args, f'--seed={seed}')
            for seed in (1, 1, 2)]
    assert [code for code, _, _ in runs] == [0, 0, 0]
    outs = [out for _, out, _ in runs]
    assert outs[0] == outs[1] != outs[2]
    header, body = outs[0].split('\n', 1)
    assert header.startswith(model_class.__name__)
    samples = body.split('\n---------------\n')
    assert len(samples) == 3 and samples[2] == ''
    assert all(len(text) == 32 and text.startswith('ab') for text in samples[:2])
    assert samples[0] != samples[1]


def test_padded_ids_are_never_drawn(tmp_path, program):
    model = tiny_model(GPT, vocab_size=64)
    # its tokenizer has 14 characters, so ids from 14 on would not decode
    save(tmp_path / 'ckpt.pt', model)
    code, out, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu',
                             '--num_samples=3', '--temperature=5')
    assert code == 0, err


def test_prompts_from_files_and_longer_than_the_context(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    (tmp_path / 'prompt.txt').write_text('abc\n' * 10)
    code, out, _ = program(sample.main, f'--out_dir={tmp_path / "ckpt.pt"}', '--device=cpu',
                           f'--start=FILE:{tmp_path / "prompt.txt"}', '--num_samples=1',
                           '--max_new_tokens=1')
    assert code == 0 and 'abc\n' * 10 in out


def sample_texts(program, tmp_path, *args):
    code, out, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu',
                             '--max_new_tokens=30', *args)
    assert code == 0, err
    return out.split('\n', 1)[1].split('\n---------------\n')[:-1]


def test_the_model_is_named_in_one_of_four_ways(tmp_path, program, monkeypatch):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    save(tmp_path / 'ckpt_mla.pt', tiny_model(GPT_MLA))
    args = ['--device=cpu', '--num_samples=1', '--max_new_tokens=5']
    path = tmp_path / 'ckpt.pt'
    old = program(sample.main, f'--out_dir={tmp_path}', *args)
    assert old[0] == 0 and old[1].startswith('GPT: ')
    for new in ([path], [tmp_path], [f'--model={path}'], [f'--model={tmp_path}'],
                ['--out_dir=nothing', path], ['--init_from=gpt2', f'--model={path}']):
        assert program(sample.main, *args, *new)[:2] == old[:2]
    code, out, err = program(lambda: sample.main('mla', out_dir='out_mla'), tmp_path, *args)
    assert code == 0 and out.startswith('GPT_MLA: '), err
    monkeypatch.chdir(tmp_path)  # where a folder has the name of a GPT-2
    (tmp_path / 'gpt2').mkdir()
    path.rename(tmp_path / 'gpt2' / 'ckpt.pt')
    assert program(sample.main, 'gpt2', *args)[1] == old[1]
    for argv, words in ((['nothing.pt'], 'there is no checkpoint nothing.pt'),
                        (['gpt2', 'nothing.pt'], "there is no config file 'nothing.pt'")):
        code, out, err = program(sample.main, *argv, *args)
        assert code == 2 and words in err and err.count('\n') == 1 and out == ''


def test_a_line_break_in_the_prompt_and_the_stop_token(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    (tmp_path / 'prompt.txt').write_text('a\\n')
    args = ['--num_samples=3', '--temperature=2']
    for start in ('\n', 'ab\ncd'):
        texts = sample_texts(program, tmp_path, *args, f'--start={start}')
        assert all(text.startswith(start) for text in texts)
        escaped = start.replace('\n', '\\n')
        assert sample_texts(program, tmp_path, *args, f'--start={escaped}') == texts
    texts = sample_texts(program, tmp_path, *args, '--start=a')
    cut = [text.split('\n')[0] for text in texts]
    assert cut != texts
    assert sample_texts(program, tmp_path, *args, '--start=a', '--stop=\\n') == cut
    code, _, err = program(sample.main, tmp_path, f'--start=FILE:{tmp_path / "prompt.txt"}')
    assert code == 2 and "the text has '\\\\', 'n', which the model's vocabulary" in err


@pytest.mark.parametrize('name', ['sample.py', 'sample_mla.py', 'sample_k_ahead.py'])
def test_help_says_what_a_program_does(name, program, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = program(script(name), '--help')
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith('Sample from a '), err
    assert f'usage: python {name} [MODEL] [CONFIG.py ...]' in out
    assert any(line.startswith(f'    python {name} ') for line in lines)
    assert "  --start='\\n'" in out and max(map(len, lines)) <= 100


def test_all_heads_of_a_k_ahead_model(tmp_path, program, monkeypatch):
    save(tmp_path / 'ckpt_k_ahead.pt', tiny_model(GPT_KAhead))
    args = [f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=3', '--batch_size=2',
            '--max_new_tokens=40', '--temperature=0', '--past_context=drop']
    batches = []

    def decode(model, idx, *args, **settings):
        batches.append(len(idx))
        return generate.decode(model, idx, *args, **settings)
    monkeypatch.setattr(sample, 'decode', decode)
    code, all_heads, err = program(lambda: sample.main('k_ahead'), *args)
    assert code == 0 and 'tokens per pass' in err
    assert batches == [2, 1]  # each text is decoded once
    code, one_by_one, err = program(lambda: sample.main('k_ahead'), *args, '--speculative=False')
    assert code == 0 and one_by_one == all_heads and 'tokens per pass' not in err
    code, _, err = program(lambda: sample.main('k_ahead'), *args, '--compile')
    assert code == 2 and 'compile=True is not for' in err and err.count('\n') == 1
    (tmp_path / 'gpt').mkdir()
    save(tmp_path / 'gpt' / 'ckpt.pt', tiny_model(GPT))
    code, _, err = program(lambda: sample.main('k_ahead'), f'--out_dir={tmp_path / "gpt"}',
                           '--device=cpu')
    assert code == 2 and err.count('\n') == 1
    assert 'holds a GPT, which has no heads to guess with' in err
    code, streamed, err = program(lambda: sample.main('k_ahead'), *args, '--stream')
    assert code == 0 and streamed == all_heads


def test_a_sample_is_the_same_streamed_or_in_any_batch(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    texts = sample_texts(program, tmp_path, '--num_samples=5')
    assert len(set(texts)) == 5
    for args in (['--batch_size=1'], ['--batch_size=2'], ['--stream=True'],
                 ['--stream=True', '--past_context=slide']):
        assert sample_texts(program, tmp_path, '--num_samples=5', *args) == texts
    assert sample_texts(program, tmp_path, '--num_samples=2') == texts[:2]
    assert sample_texts(program, tmp_path, '--num_samples=5', '--past_context=drop') != texts


def test_temperature_0_and_top_k_1_take_the_likeliest(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    greedy = sample_texts(program, tmp_path, '--num_samples=2', '--temperature=0')
    assert greedy[0] == greedy[1]
    for args in (['--top_k=1'], ['--top_p=1e-6', '--top_k=14']):
        assert sample_texts(program, tmp_path, '--num_samples=2', *args) == greedy
    # clamped to the vocabulary
    assert len(set(sample_texts(program, tmp_path, '--num_samples=2', '--top_k=999'))) == 2


def test_stop_token_ends_a_sample_and_is_not_printed(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    free = sample_texts(program, tmp_path, '--num_samples=4', '--start=a')
    assert any('e' in text for text in free)
    cut = [text.split('e')[0] for text in free]
    for args in ([], ['--stream=True'], ['--batch_size=3']):
        args = ['--num_samples=4', '--start=a', '--stop=e', *args]
        assert sample_texts(program, tmp_path, *args) == cut


def test_json_lines(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    texts = sample_texts(program, tmp_path, '--num_samples=3', '--start=ab')
    code, out, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu',
                             '--max_new_tokens=30', '--num_samples=3', '--start=ab', '--json=True')
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row['sample'] for row in rows] == [0, 1, 2]
    assert 'tokens/s' in err and err.startswith('GPT: ')
    for row, text in zip(rows, texts):
        assert row['prompt'] + row['text'] == text and not row['stopped'] and row['prompt'] == 'ab'
        assert ''.join(CHARS[i] for i in row['tokens']) == row['text'] and len(row['tokens']) == 30
    code, out, _ = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=2',
                           '--json=True', '--max_new_tokens=0')
    assert [json.loads(line)['tokens'] for line in out.splitlines()] == [[], []]


def test_prompt_from_standard_input(tmp_path, program, monkeypatch):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    args = [f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=1', '--start=-',
            '--max_new_tokens=3', '--json=True']
    for prompt, words in ((b'abc\nabc' * 5, None), (b'', 'start is empty'),
                          (b'\xff', 'start=- cannot be read')):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(prompt)))
        code, out, err = program(sample.main, *args)
        if words:
            assert code == 2 and words in err and err.count('\n') == 1
        else:
            assert json.loads(out)['prompt'] == prompt.decode()


@pytest.mark.parametrize('length', [15, 16, 17, 50])
def test_prompts_that_fill_the_context(length, tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    for args in ([], ['--past_context=drop']):
        start = f'--start={"abcde" * 10:.{length}}'
        texts = sample_texts(program, tmp_path, '--num_samples=2', start, *args)
        assert [len(text) for text in texts] == [length + 30] * 2


def test_streaming_holds_half_characters_back(tmp_path, program, monkeypatch):
    """GPT-2's byte pairs cut a rare character into several tokens."""
    save(tmp_path / 'ckpt.pt', tiny_model(GPT, vocab_size=50304), 'gpt2')
    ids = gpt2_encoding().encode('a 東京 🙂!')
    printed = []
    monkeypatch.setattr(sample, 'decode', lambda *args, **kwargs:
                        iter([torch.tensor([i]) for i in ids + ids[3:4]]))
    monkeypatch.setattr(sample, 'print', lambda text, end='\n', **kwargs:
                        printed.append(text + end), raising=False)
    code, _, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=1',
                           '--stream=True')
    text = ''.join(printed)
    assert code == 0 and 'a 東京 🙂!' in text and len(ids) > 7, err
    # the half character that the sample ends with
    assert text.count('\N{REPLACEMENT CHARACTER}') == 1


def test_samples_from_a_hugging_face_directory(tmp_path, program):
    save_hugging_face(tiny_model(GPT, vocab_size=50304), tmp_path / 'hf')
    args = ['--device=cpu', '--num_samples=1', '--max_new_tokens=3', '--start=To be',
            '--dtype=bfloat16']
    code, out, err = program(sample.main, f'--init_from={tmp_path / "hf"}', *args)
    assert code == 0 and 'To be' in out, err
    assert program(sample.main, tmp_path / 'hf', *args)[1] == out
    export_huggingface.to_hugging_face(tiny_model(GPT)).save_pretrained(tmp_path / 'chars')
    (tmp_path / 'bert').mkdir()
    (tmp_path / 'bert' / 'config.json').write_text('{"model_type": "bert"}')
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'config.json').write_text('{')
    code, out, err = program(sample.main, tmp_path / 'chars', '--device=cpu', '--start=3 13',
                             '--num_samples=1', '--max_new_tokens=5')
    ids = out.splitlines()[1].split()
    assert code == 0 and 'what the ids of' in err and ids[:2] == ['3', '13'] and len(ids) == 7
    assert all(0 <= int(i) < 14 for i in ids)
    for name, words in (('bert', "of type 'bert', not one of gpt2"),
                        ('broken', 'cannot be loaded')):
        code, out, err = program(sample.main, f'--init_from={tmp_path / name}', '--device=cpu')
        assert code == 2 and words in err and err.count('\n') == 1 and out == ''


@pytest.mark.parametrize('args, words', [
    (['--start=é'], "has 'é', which the model's vocabulary of 14 characters lacks"),
    (['--start='], 'start is empty'),
    (['--start=FILE:nothing.txt'], 'start=FILE:nothing.txt cannot be read'),
    (['--top_k=0'], 'top_k=0 must be at least 1'), (['--num_samples=0'], 'num_samples=0'),
    (['--temperature=-1'], 'temperature=-1.0 must be at least 0'),
    (['--init_from=bert'], "init_from='bert' must be 'resume'"),
    (['--init_from=gpt2-huge'], 'gpt2-medium'), (['--top_p=0'], 'top_p=0.0 must be above 0'),
    (['--top_p=1.1'], 'top_p=1.1'), (['--batch_size=0'], 'batch_size=0'),
    (['--stop=ab'], "stop='ab' is 2 tokens"),
    (['--stream=True', '--json=True'], 'exclude each other'),
    (['--past_context=forget'], "must be slide or drop"), (['--device=tpu'], "device='tpu'"),
    (['--out_dir=nothing'], 'there is no checkpoint nothing'),
    (['--temprature=1'], 'did you mean temperature?')])
def test_bad_input(args, words, tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    code, out, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu', *args)
    assert code == 2 and words in err and err.startswith('error: ') and err.count('\n') == 1
    assert '---' not in out


@pytest.mark.parametrize('name, folder', [
    ('sample.py', 'out'), ('sample_mla.py', 'out_mla'), ('sample_k_ahead.py', 'out_k_ahead')])
def test_programs_and_their_default_folders(name, folder, tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = program(script(str(ROOT / name)))
    assert code == 2 and err.startswith(f'error: there is no checkpoint {folder}/ckpt')
    assert err.count('\n') == 1
