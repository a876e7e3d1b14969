import json
import math

from configurator import UserError

import numpy as np
import pytest
import torch
from conftest import ALL, CHARS, save_hugging_face, tiny_model
from scipy import stats
from test_checkpoint import save

import evaluate
import export_huggingface
from evaluate import (
    RUNS,
    Question,
    ending_losses,
    question_scores,
    ratio,
    split_loss,
    text_scores,
    token_losses,
    wilson,
)
from model import GPT
from runtime.dataset import open_data, write_splits
from runtime.tokenizer import gpt2_encoding, make_tokenizer

RIGHT = {'ctx': 'abc', 'endings': ['de', 'fgh', 'a', 'lk'], 'label': 1}


@pytest.fixture
def call(tmp_path, data_dir, program):
    """Save a model, by default a GPT of characters, and evaluate it, by default on data_dir."""
    def run(*args, model=None, tokenizer=CHARS):
        path = tmp_path / 'model.pt'
        save(path, model or tiny_model(GPT), tokenizer)
        given = [a for a in args if not a.startswith('--dataset')]
        dataset = [a for a in args if a.startswith('--dataset')] or [f'--dataset={data_dir}']
        return program(evaluate.main, f'--model={path}', *dataset, '--device=cpu', *given)
    return run


def write_questions(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return f'--hellaswag={path}'


def by_hand(model, ids):
    """The log-probability of each token of ids after the first, by head 1 in float64, one pass for
    each token."""
    double = type(model)(model.config)
    double.load_state_dict(model.state_dict())
    double = double.double().eval()
    with torch.no_grad():
        return [double.next_logits(torch.tensor([ids[:i]])).log_softmax(-1)[0, ids[i]].item()
                for i in range(1, len(ids))]


@ALL
@pytest.mark.parametrize('max_tokens', [0, 2, 16, 17, 18, 33])
def test_loss_against_a_loop_in_float64(model_class, max_tokens, call, data_dir):
    model, tokens = tiny_model(model_class), open_data(data_dir).val.tolist()[:max_tokens or None]
    n = len(tokens) - 1
    expected = -sum(sum(by_hand(model, tokens[i:i + 17])) for i in range(0, n, 16)) / n
    code, out, err = call('--json', f'--max_tokens={max_tokens}', '--batch_size=3', model=model)
    result = json.loads(out)
    assert code == 0 and result['tokens'] == n and result['windows'] == -(-n // 16), err
    assert result['loss'] == pytest.approx(expected, abs=1e-6)
    assert result['perplexity'] == pytest.approx(math.exp(expected), rel=1e-6)
    # a byte for each character
    assert result['bits_per_byte'] == pytest.approx(expected / math.log(2), rel=1e-6)
    assert split_loss(model, np.array(tokens, dtype=np.uint16)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('rows', [1, 7, 48])
def test_logits_in_parts_and_targets_left_out(rows, monkeypatch):
    model, most = tiny_model(GPT), []
    idx, targets = torch.randint(14, (3, 16)), torch.randint(14, (3, 16))
    targets[0, :9] = targets[2, 4] = -1
    monkeypatch.setattr(evaluate, 'LOGIT_ROWS', rows)
    model.lm_head.register_forward_hook(
        lambda module, args, y: most.append(y.numel() // y.size(-1)))
    losses = token_losses(model, idx, targets)
    with torch.no_grad():
        logits = model(idx, targets)[0]
    expected = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = expected.masked_fill(targets == -1, 0).double()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert max(most[:-1]) == min(rows, 38) and losses.dtype == torch.float64


def test_a_model_of_transformers(tmp_path, data_dir, program):
    """The loss that transformers itself has for the exported weights, of GPT-2's byte pairs."""
    model = tiny_model(GPT, vocab_size=50304)
    hf = export_huggingface.to_hugging_face(model)
    save_hugging_face(model, tmp_path / 'hf')
    text = 'To be, or not to be — that is the 東京 question 🙂, whether it is nobler\n' * 3
    ids = gpt2_encoding().encode(text)
    folder = tmp_path / 'bpe'
    folder.mkdir()
    write_splits(folder, ids, ids, make_tokenizer('gpt2'))
    code, out, err = program(evaluate.main, f'--model={tmp_path / "hf"}', f'--dataset={folder}',
                             '--json', '--device=cpu')
    result, nats = json.loads(out), 0.0
    assert code == 0, err
    for i in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[i:i + 17]])
        with torch.no_grad():
            logits = hf(window[:, :-1]).logits
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction='sum').item()
    n_bytes = len(text.encode()) - len(gpt2_encoding().decode_single_token_bytes(ids[0]))
    assert result['loss'] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    # characters of several bytes, cut into several tokens
    assert result['bytes'] == n_bytes and n_bytes > len(text) + 20
    assert result['bits_per_byte'] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_ends_of_documents_are_no_text():
    model, text = tiny_model(GPT, vocab_size=50304), 'To be, or not to be'
    tokens = np.array((gpt2_encoding().encode(text) + [50256]) * 9)
    scores = text_scores(model, tokens, make_tokenizer('gpt2'), torch.float32, 2)
    assert scores['bytes'] == 9 * len(text) - len('To')
    bits = scores['loss'] * (len(tokens) - 1) / math.log(2)
    assert scores['bits_per_byte'] == pytest.approx(bits / scores['bytes'])
    with pytest.raises(UserError, match='ends of documents alone'):
        text_scores(model, np.array([50256] * 9), make_tokenizer('gpt2'), torch.float32, 2)


def test_bits_per_byte_of_characters_that_are_longer_than_a_byte():
    chars = list('aé東🙂')  # of 1, 2, 3 and 4 bytes
    tokens = np.array([3, 0, 1, 2, 3, 3, 0, 2] * 6, dtype=np.uint16)
    model = tiny_model(GPT, vocab_size=4)
    scores = text_scores(model, tokens, make_tokenizer(chars), torch.float32, 2)
    text = ''.join(chars[i] for i in tokens[1:])
    assert scores['bytes'] == len(text.encode()) == 6 * 22 - 4
    bits = split_loss(model, tokens) * 47 / math.log(2)
    assert scores['bits_per_byte'] == pytest.approx(bits / len(text.encode()), rel=1e-9)
    n_tokens = np.array([16, 16, 15])
    nats = n_tokens * [split_loss(model, tokens[i:i + 17]) for i in (0, 16, 32)]
    n_bytes = np.array([len(text[i:i + 16].encode()) for i in (0, 16, 32)])
    expected = hand_interval(nats / math.log(2), n_bytes)
    assert scores['bits_per_byte_interval'] == pytest.approx(expected, rel=1e-6)
    low, high = scores['loss_interval']
    assert [low, high] == pytest.approx(hand_interval(nats, n_tokens), rel=1e-6)
    assert scores['perplexity_interval'] == pytest.approx([math.exp(low), math.exp(high)])


def hand_interval(totals, sizes):
    """The ratio estimator's interval: the mean of the residuals' squares over the mean size, as a
    textbook has it."""
    n, value = len(totals), totals.sum() / sizes.sum()
    error = np.std(totals - value * sizes, ddof=1) / math.sqrt(n) / sizes.mean()
    return [value - stats.t.ppf(0.975, n - 1) * error, value + stats.t.ppf(0.975, n - 1) * error]


def test_windows_of_one_size_have_the_interval_of_a_mean():
    means = np.random.default_rng(0).normal(2, 1, size=20)
    value, interval = ratio(means * 64, np.full(20, 64))
    expected = stats.t.interval(0.95, 19, loc=means.mean(), scale=stats.sem(means))
    assert value == pytest.approx(means.mean()) and interval == pytest.approx(list(expected))
    runs = np.random.default_rng(0).normal(2, 1, size=(RUNS, 7))
    value, interval = ratio(runs.flatten() * 64, np.full(7 * RUNS, 64))
    expected = stats.t.interval(0.95, RUNS - 1, loc=runs.mean(), scale=stats.sem(runs.mean(axis=1)))
    assert value == pytest.approx(runs.mean()) and interval == pytest.approx(list(expected))
    assert ratio(np.array([5.0]), np.array([2]))[1] is None


# with memory, a window resembles the one before
@pytest.mark.parametrize('memory, n', [(0, 5), (0, 100), (0.8, 2000)])
def test_nineteen_of_twenty_intervals_hold_the_truth(memory, n):
    rng, hits = np.random.default_rng(1), 0
    for _ in range(500):
        noise = rng.normal(size=n + 100)
        for i in range(1, len(noise) if memory else 0):
            noise[i] += memory * noise[i - 1]
        sizes = np.full(n, 64)
        sizes[-1] = 20
        low, high = ratio((2 + 0.3 * noise[100:]) * sizes, sizes)[1]
        hits += low < 2 < high
    assert 0.92 < hits / 500 < 0.98


def test_wilson_against_scipy():
    for right, n in ((0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (2500, 10_042)):
        share, interval = wilson(right, n)
        expected = stats.binomtest(right, n).proportion_ci(method='wilson')
        assert share == right / n
        assert interval == pytest.approx([expected.low, expected.high], abs=1e-6)


@ALL
@pytest.mark.parametrize('batch_size', [1, 64])
def test_log_probabilities_of_endings_by_hand(model_class, batch_size):
    """Every ending alone and unpadded, token after token in float64. Contexts and endings have many
    lengths, and some are too long."""
    model, rng = tiny_model(model_class), np.random.default_rng(0)
    questions = [Question(rng.integers(14, size=n).tolist(),
                          [rng.integers(14, size=m).tolist() for m in sizes], np.array(sizes), 0)
                 for n, sizes in ((1, (1, 2)), (5, (3, 15, 1)), (12, (4, 5)), (40, (15, 1, 7, 7)),
                                  (16, (1, 1)))]
    found = ending_losses(model, questions, torch.float32, batch_size)
    assert [len(losses) for losses in found] == [2, 3, 2, 4, 2]
    for question, losses in zip(questions, found):
        for ending, loss in zip(question.endings, losses):
            ids = (question.context + ending)[-17:]  # 16 of them are read to predict the last
            assert loss == pytest.approx(-sum(by_hand(model, ids)[-len(ending):]), abs=1e-5)


def test_a_batch_of_endings_has_no_more_tokens_than_one_of_windows():
    model, sizes = tiny_model(GPT), []
    model.transformer.wte.register_forward_hook(lambda module, args, y: sizes.append(args[0].shape))
    questions = [Question([1] * n, [[2], [3, 4]], np.array([1, 2]), 0)
                 for n in (1, 30, 2, 9, 3, 30, 1, 1)]
    ending_losses(model, questions, torch.float32, 2)
    assert sum(B for B, _ in sizes) == 16 and max(B for B, _ in sizes) > 4
    assert max(B * T for B, T in sizes) <= 2 * 16


@ALL
def test_a_long_context_is_read_from_its_end(model_class):
    model, context = tiny_model(model_class), [i % 14 for i in range(60)]
    losses = []
    for ids in (context, context[-14:], context[-13:]):
        question = Question(ids, [[3, 4, 5], [9, 1, 0]], np.array([3, 3]), 0)
        losses += ending_losses(model, [question], torch.float32, 8)
    np.testing.assert_array_equal(losses[0], losses[1])
    assert np.abs(losses[1] - losses[2]).max() > 1e-4


@ALL
def test_accuracies_from_log_probabilities(model_class, call, tmp_path):
    model, tokenizer, rows = tiny_model(model_class), make_tokenizer(CHARS), []
    model.lm_head.weight.data *= 30  # decided opinions
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows.append({'ctx': ''.join(rng.choice(CHARS, size=5)), 'label': int(rng.integers(3)),
                     'endings': [''.join(rng.choice(CHARS[1:], size=n))
                                 for n in rng.integers(1, 7, size=3)]})
    right, right_norm = 0, 0
    for row in rows:
        context, scores = tokenizer.encode(row['ctx']), []
        for ending in row['endings']:
            ids = tokenizer.encode(' ' + ending)
            scores.append(sum(by_hand(model, context + ids)[-len(ids):]))
        right += int(np.argmax(scores)) == row['label']
        by_length = [s / len(end) for s, end in zip(scores, row['endings'])]
        right_norm += int(np.argmax(by_length)) == row['label']
    assert right != right_norm
    code, out, err = call('--json', write_questions(tmp_path / 'q.jsonl', *rows), model=model)
    result = json.loads(out)['hellaswag']
    assert code == 0 and result['questions'] == 20 and result['chance'] == pytest.approx(1 / 3), err
    assert (result['acc'], result['acc_norm']) == (right / 20, right_norm / 20)
    assert result['acc_interval'] == wilson(right, 20)[1]
    assert result['acc_norm_interval'] == wilson(right_norm, 20)[1]
    questions = write_questions(tmp_path / 'q.jsonl', *rows)
    part = json.loads(call('--json', questions, '--max_questions=7', model=model)[1])
    assert part['hellaswag']['questions'] == 7


def alphabet_model():
    """Each character of abc...l is followed by the next one, nearly surely. The blocks add
    nothing."""
    model = tiny_model(GPT, n_embd=32, n_layer=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(('c_proj.weight', 'c_proj.bias', 'wpe.weight')):
                p.zero_()
        wte = torch.linalg.qr(torch.randn(32, 14)).Q.T  # orthonormal rows
        # untied: row i + 1 answers to token i
        model.lm_head.weight = torch.nn.Parameter(10 * wte.roll(1, dims=0))
        model.transformer.wte.weight = torch.nn.Parameter(wte)
    return model


def test_answers_known_by_construction(tmp_path):
    model, tokenizer = alphabet_model(), make_tokenizer(CHARS)
    assert CHARS[:3] == ['\n', ' ', 'a']  # so that a follows the space before each ending
    rows = [{'ctx': 'ab', 'endings': ['cde', 'abc', 'bcd'], 'label': 1},
            {'ctx': 'ab', 'endings': ['abc', 'lkj'], 'label': '0'},
            {'ctx_a': 'ab', 'ctx_b': 'cd', 'endings': ['ca', 'ab'], 'label': '1'},
            # the model takes the other one
            {'ctx_a': 'a', 'ctx_b': '', 'endings': ['a', 'c'], 'label': 1}]
    path = tmp_path / 'q.jsonl'
    write_questions(path, *rows, '')
    questions, harness = evaluate.read_questions(path, 0, model, tokenizer)
    assert harness == [] and [q.label for q in questions] == [1, 0, 1, 1]
    assert [tokenizer.decode(q.context) for q in questions] == ['ab', 'ab', 'ab cd', 'a']
    assert [tokenizer.decode(end) for end in questions[0].endings] == [' cde', ' abc', ' bcd']
    scores = question_scores(model, questions, torch.float32, 8)
    assert scores['acc'] == 0.75 and scores['chance'] == pytest.approx((1 / 3 + 3 / 2) / 4)


def test_length_decides_between_the_two_accuracies():
    """A model to which all tokens are equal: the ending of the fewest tokens is the likeliest, and
    per byte the one of the fewest tokens for its bytes."""
    model = tiny_model(GPT)
    model.lm_head.weight.data.zero_()
    question = Question([1], [[2], [2, 3, 4]], np.array([1, 9]), 1)
    scores = question_scores(model, [question], torch.float32, 8)
    assert (scores['acc'], scores['acc_norm']) == (0, 1)


def test_byte_pairs_and_bytes_of_endings(tmp_path):
    model, tokenizer = tiny_model(GPT, vocab_size=50304), make_tokenizer('gpt2')
    write_questions(tmp_path / 'q.jsonl',
                    {'ctx': 'A man sits', 'endings': ['on a café.', '東京 🙂'], 'label': 0})
    (question,), _ = evaluate.read_questions(tmp_path / 'q.jsonl', 0, model, tokenizer)
    assert question.lengths.tolist() == [11, 11]
    assert question.context == gpt2_encoding().encode('A man sits')
    assert question.endings[0] == gpt2_encoding().encode(' on a café.')


HARNESS = [  # a row, and what lm-evaluation-harness makes of it: the query and the choices
    ({'activity_label': 'Baking', 'ctx_a': 'A man sits.', 'ctx_b': 'he BAKES', 'label': '1',
      'endings': ['[substeps] a  cake. ', 'no [x] cake [title] end', 'bread']},
     'Baking: A man sits. He bakes', [' a cake.', 'no cake. end', 'bread']),
    ({'activity_label': 'Home', 'ctx_a': '[header] How to sit [title] Sit', 'ctx_b': '',
      'ctx': 'x', 'label': 0, 'endings': ['sit', 'sits and sits']},
     'Home: How to sit. Sit', ['sit', 'sits and sits'])]


def test_the_harness_scores(tmp_path):
    rows = [row | {'ctx': 'how'} for row, _, _ in HARNESS]
    chars = sorted({c for row in rows for text in (*row['endings'], *map(str, row.values()))
                    for c in text} | set(':hH') | {c for _, query, _ in HARNESS for c in query})
    model, tokenizer = tiny_model(GPT, vocab_size=len(chars), block_size=64), make_tokenizer(chars)
    model.lm_head.weight.data *= 30
    write_questions(tmp_path / 'q.jsonl', *rows)
    questions, harness = evaluate.read_questions(tmp_path / 'q.jsonl', 0, model, tokenizer)
    scores = question_scores(model, harness, torch.float32, 8, '_harness')
    right, right_norm = [], []
    for question, (row, query, choices) in zip(harness, HARNESS):
        whole = [tokenizer.decode(question.context + end) for end in question.endings]
        assert whole == [f'{query} {choice}' for choice in choices]
        assert question.lengths.tolist() == [len(choice) for choice in choices]
        sums = []
        for text, choice in zip(whole, choices):
            n = len(text) - len(query.rstrip())
            sums.append(sum(by_hand(model, tokenizer.encode(text))[-n:]))
        right.append(int(np.argmax(sums)) == int(row['label']))
        by_length = np.array(sums) / [len(choice) for choice in choices]
        right_norm.append(int(np.argmax(by_length)) == int(row['label']))
    assert (scores['acc_harness'], scores['acc_norm_harness']) == (np.mean(right),
                                                                   np.mean(right_norm))
    assert tokenizer.decode(questions[0].context) == 'how' and 'acc' not in scores


def test_byte_pairs_are_encoded_with_their_context_as_the_harness_does(tmp_path):
    model, tokenizer = tiny_model(GPT, vocab_size=50304, block_size=64), make_tokenizer('gpt2')
    write_questions(tmp_path / 'q.jsonl', *(row for row, _, _ in HARNESS[:1]))
    _, (question,) = evaluate.read_questions(tmp_path / 'q.jsonl', 0, model, tokenizer)
    _, query, choices = HARNESS[0]
    encode = gpt2_encoding().encode
    assert question.context == encode(query)
    assert question.endings == [encode(f'{query} {choice}')[len(encode(query)):]
                                for choice in choices]


@pytest.mark.parametrize('change_of_row, words', [
    ({'activity_label': None}, 'line 2 has no text activity_label, ctx_a and ctx_b'),
    ({'ctx_b': ...}, 'line 2 has no text activity_label'),
    ({'endings': ['a', '[b]']}, 'line 2 has an ending of brackets alone'),
    ({'activity_label': 'Q'}, "line 2: the text has 'Q'")])
def test_the_harness_scores_are_left_out_where_they_cannot_be_had(change_of_row, words, tmp_path,
                                                                   capsys):
    row = {'activity_label': 'a', 'ctx_a': 'b', 'ctx_b': 'c', 'ctx': 'd', 'label': 0,
           'endings': ['a', 'b']}
    tokenizer = make_tokenizer(list(' :[]abcdABCD'))
    model = tiny_model(GPT, vocab_size=12)
    bad = {key: value for key, value in (row | change_of_row).items() if value is not ...}
    write_questions(tmp_path / 'q.jsonl', row, bad)
    questions, harness = evaluate.read_questions(tmp_path / 'q.jsonl', 0, model, tokenizer)
    assert len(questions) == 2 and harness == []
    err = capsys.readouterr().err
    assert err.startswith('note: no scores as lm-evaluation-harness has them') and words in err
    _, harness = evaluate.read_questions(tmp_path / 'q.jsonl', 1, model, tokenizer)
    assert len(harness) == 1


def change(**keys):
    return {key: value for key, value in (RIGHT | keys).items() if value is not ...}


@pytest.mark.parametrize('row, words', [
    (change(ctx=...), 'line 2 has no text ctx, nor ctx_a and ctx_b'),
    (change(ctx=''), 'line 2 has no text ctx'), (change(ctx=7), 'line 2 has no text ctx'),
    (change(ctx=..., ctx_a='a'), 'line 2 has no text ctx'),
    (change(endings=...), 'line 2: endings must be a list of two texts or more'),
    (change(endings=['a']), 'line 2: endings must be'),
    (change(endings=['a', '']), 'none of them empty'),
    (change(endings='ab'), 'line 2: endings must be'),
    (change(endings=['a', 1]), 'line 2: endings must be'),
    (change(label=...), 'line 2: label=None must be a number from 0 to 3'),
    (change(label=4), 'line 2: label=4 must be'), (change(label=-1), 'line 2: label=-1'),
    (change(label='4'), "line 2: label='4'"),
    (change(label=''), "line 2: label='' must be"), (change(label=True), 'line 2: label=True'),
    (change(label=1.0), 'line 2: label=1.0'),
    (change(label='9' * 5000), 'line 2: label='), ('{"ctx": "a"', 'line 2 is not JSON'),
    ('[1, 2]', 'line 2 has no text ctx'), ('[' * 100_000, 'line 2 is not JSON'),
    (change(ctx='abXé'), "line 2: the text has 'X', 'é', which the model's vocabulary of 14 "
                         "characters lacks"),
    (change(endings=['a' * 15, 'b']), 'line 2 has an ending of 16 tokens, the model can take '
                                      'block_size - 1 = 15')])
def test_wrong_questions(row, words, call, tmp_path):
    questions = write_questions(tmp_path / 'q.jsonl', RIGHT, row)
    code, out, err = call(questions)
    assert code == 2 and out == '' and words in err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert call(questions, '--max_questions=1')[0] == 0  # which does not get there


def test_wrong_files(call, tmp_path):
    (tmp_path / 'empty.jsonl').write_text('\n\n')
    (tmp_path / 'latin.jsonl').write_bytes(b'\xff\xfe')
    for name, words in (('nothing.jsonl', 'cannot be read'), ('empty.jsonl', 'is empty'),
                        ('latin.jsonl', 'cannot be read'), ('data', 'cannot be read')):
        code, out, err = call(f'--hellaswag={tmp_path / name}')
        assert code == 2 and out == '' and words in err
        assert err.startswith('error: hellaswag=') and err.count('\n') == 1


def test_the_longest_ending_that_fits(call, tmp_path):
    row = change(ctx='abc' * 9, endings=['a' * 14, 'b'], label=0)
    code, out, err = call('--json', write_questions(tmp_path / 'q.jsonl', row))
    assert code == 0 and json.loads(out)['hellaswag']['questions'] == 1, err


def test_data_of_another_vocabulary(call, tmp_path, data_dir):
    other = tmp_path / 'other'
    other.mkdir()
    write_splits(other, [0, 1] * 100, [1, 0] * 50, make_tokenizer(['x', *CHARS[1:]]))
    (tmp_path / 'bpe').mkdir()
    write_splits(tmp_path / 'bpe', [50_000] * 99, [50_000] * 99, make_tokenizer('gpt2'))
    (tmp_path / 'short').mkdir()
    write_splits(tmp_path / 'short', [0] * 99, [0], make_tokenizer(CHARS))
    write_splits(data_dir, [0] * 99, [0, 13, 14] * 20, make_tokenizer(CHARS))
    for name, words in (('other', "has 'x', which the model's vocabulary of 14"),
                        ('bpe', 'has another vocabulary'), ('nothing', 'no folder'),
                        ('data', 'token id 14, which vocab_size=14 does not allow'),
                        ('short', 'has one token')):
        code, out, err = call(f'--dataset={tmp_path / name}')
        assert code == 2 and out == '' and words in err and err.count('\n') == 1
    assert call('--max_tokens=2')[0] == 0  # before the id that is too large
    model = tiny_model(GPT, vocab_size=50_304)  # padded ids have no bytes
    write_splits(tmp_path / 'bpe', [50_257] * 99, [50_257] * 99, make_tokenizer('gpt2'))
    code, out, err = call(f'--dataset={tmp_path / "bpe"}', model=model, tokenizer='gpt2')
    assert code == 2 and 'token id 50257, which vocab_size=50257 does not allow' in err


def test_the_data_that_the_checkpoint_names(data_dir, tmp_path, program):
    path, questions = tmp_path / 'model.pt', write_questions(tmp_path / 'q.jsonl', RIGHT)
    save(path, tiny_model(GPT))
    checkpoint = torch.load(path, weights_only=True)
    for dataset in (str(data_dir), ''):
        torch.save(checkpoint | {'config': {'dataset': dataset}}, path)
        args = ['--device=cpu', '--json', questions]
        code, out, err = program(evaluate.main, f'--model={path}', *args)
        result = json.loads(out)
        assert code == 0 and result['settings']['dataset'] == dataset
        assert ('loss' in result) == bool(dataset)
        assert program(evaluate.main, *args, path)[1] == out
        assert result['hellaswag']['questions'] == 1
    code, out, err = program(evaluate.main, f'--model={path}', '--device=cpu')
    assert code == 2 and 'does not name the data of its training' in err and err.count('\n') == 1


def test_a_loss_that_is_no_number(call, tmp_path):
    for weight, words in ((math.nan, 'weights that are not finite'), (1e6, 'the loss is ')):
        model = tiny_model(GPT)
        model.lm_head.weight.data[:, 0] = weight
        model.lm_head.weight.data[3] *= -1
        code, out, err = call(model=model)
        assert code == 2 and out == '' and words in err and err.count('\n') == 1
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(evaluate.UserError, match='of an ending is no number'):
        question_scores(model, [Question([1], [[2], [3]], np.ones(2), 0)], torch.float32, 8)


def test_the_table_and_the_object(call, tmp_path):
    args = [write_questions(tmp_path / 'q.jsonl', RIGHT, change(label='2')), '--split=train',
            '--dtype=bfloat16']
    code, table, err = call(*args)
    assert code == 0 and err.startswith('note: no scores as lm-evaluation-harness has them')
    result = json.loads(call(*args, '--json')[1])
    settings = result['settings']
    assert settings['split'] == 'train' and settings['dtype'] == 'bfloat16'
    assert result['tokens'] == 3999 and table.startswith('GPT: 2 layers')
    assert '3,999 tokens predicted, 3,999 bytes, windows of 16: 250' in table
    assert '2 questions, of which guessing gets 25.0%' in table
    lines = {line[:18].strip(): line for line in table.splitlines()[4:]}
    for title, key, form in (('loss', 'loss', '{:.4f}'), ('perplexity', 'perplexity', '{:.3f}'),
                             ('bits per byte', 'bits_per_byte', '{:.4f}'), ('acc', 'acc', '{:.1%}'),
                             ('acc_norm', 'acc_norm', '{:.1%}')):
        scores = result | result['hellaswag']
        low, high = scores[f'{key}_interval']
        assert low <= scores[key] <= high and form.format(scores[key]) in lines[title]
        assert lines[title].endswith(f'{form.format(low)} to {form.format(high)}')
    exact = json.loads(call('--json', '--split=train')[1])
    assert result['loss'] == pytest.approx(exact['loss'], abs=1e-2) and exact['hellaswag'] is None
    code, table, _ = call('--max_tokens=10')
    assert code == 0 and table.count('unknown from a single window') == 3


@pytest.mark.parametrize('args, words', [
    (['--max_tokens=1'], 'max_tokens=1 leaves nothing'),
    (['--max_tokens=-1'], 'max_tokens=-1 must be at least 0'),
    (['--max_questions=-1'], 'max_questions=-1'), (['--batch_size=0'], 'batch_size=0'),
    (['--split=test'], 'must be train or val'), (['--device=tpu'], "device='tpu'"),
    (['--hellasvag=x'], 'did you mean hellaswag?'),
    (['--model=nothing'], 'there is no checkpoint')])
def test_bad_input(args, words, call):
    code, out, err = call(*args)
    assert code == 2 and out == '' and words in err
    assert err.startswith('error: ') and err.count('\n') == 1
