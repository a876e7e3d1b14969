"""
How well a model predicts a text, and how often it picks the right one of several endings:

    python evaluate.py out/ckpt.pt                  the val split of the data of its training
    python evaluate.py gpt2 --dataset=shakespeare --hellaswag=hellaswag_val.jsonl --json

It needs a checkpoint, or GPT-2's weights, and prepared data or a file of questions.

The loss is in nats per token, and perplexity is its exponential. Bits per byte compare models of
different tokenizers. They count the UTF-8 bytes of the text that the predicted tokens stand for.
The 95 % intervals say what another text of the same kind would give. The tokens of a window are no
independent draws, and neither are neighbouring windows. So the standard error is that over runs of
windows.

A question is a line of JSON with ctx (or ctx_a and ctx_b), endings and label, as in HellaSwag
(Zellers et al. 2019). The model picks the likeliest ending, in two ways:

    acc, acc_norm                   it reads ctx + ' ' + ending as it stands; by the ending's
                                    log-probability, and by that over its UTF-8 bytes
    acc_harness, acc_norm_harness   as lm-evaluation-harness: activity_label, ctx_a and ctx_b with a
                                    capital, both cleaned of brackets; by the log-probability, and
                                    by that over the ending's characters

The second way is left out where a question lacks what it needs. The intervals are those of Wilson
1927.

The first head of a k-ahead model answers. Weights stay float32. dtype is that of the arithmetic in
the blocks.
"""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from configurator import UserError, check_least, configure, run

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models import describe
from runtime.dataset import check_ids
from runtime.device import autocast, pick_device, pick_dtype
from runtime.loading import load_model
from runtime.progress import progress_bar
from sample import encode

LOGIT_ROWS = 2048  # tokens whose logits are alive at once: 400 MB with GPT-2's vocabulary
# Runs of neighbouring windows. They are enough for Student's t, and each is so long that it says
# little about the next.
RUNS = 32


@dataclass
class EvaluateConfig:
    model: str = 'out'  # a checkpoint, an out_dir, the directory of a Hugging Face GPT-2, or a
                        # name such as gpt2
    dataset: str = ''  # prepared data, as the trainer takes it; '': what the checkpoint was
                       # trained on
    split: Literal['train', 'val'] = 'val'  # of the dataset
    max_tokens: int = 0  # of the split, from its beginning; 0: all
    hellaswag: str = ''  # a JSON lines file of multiple-choice questions; '': none
    max_questions: int = 0  # of the file, from its beginning; 0: all
    batch_size: int = 8  # windows of block_size side by side, or as many tokens of questions
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # autocast; 'auto':
                                                                       # bfloat16 on a GPU
    json: bool = False  # print one JSON object in place of the table

    def __post_init__(self):
        check_least(self, max_tokens=0, max_questions=0, batch_size=1)
        if self.max_tokens == 1:
            raise ValueError('max_tokens=1 leaves nothing to predict: give at least 2, or 0 for '
                             'all')


@torch.no_grad()
def token_losses(model, idx, targets, dtype=torch.float32):
    """The loss in nats of each of targets (B, T), the tokens after idx (B, T), and 0 where they
    are -1. Of several heads the first one counts. Float64 (B, T) on the CPU."""
    with autocast(idx.device.type, dtype):
        x = model.embed(idx)  # (B, T, n_embd)
        for block in model.transformer.h:
            x = block(x)
    return stream_losses(model, x, targets)


@torch.no_grad()
def stream_losses(model, x, targets):
    """As token_losses, from the last residual stream x (B, T, n_embd)."""
    asked = targets != -1
    # Not in autocast: logits of GPT-2 can be near -100, where the steps of bfloat16 are 0.5 wide.
    found = []
    for rows, wanted in zip(x[asked].split(LOGIT_ROWS), targets[asked].split(LOGIT_ROWS)):
        logits = model.unembed(rows).float()
        found.append(F.cross_entropy(logits, wanted, reduction='none'))
    losses = torch.zeros(targets.shape, dtype=torch.float64)
    losses[asked.cpu()] = torch.cat(found).cpu().double()
    return losses


def window_spans(n_tokens, block_size, sequence=None):
    """(first input, last target) of each window that is evaluated. Those of a text predict every
    token but the first once, and the last one may be shorter. Sequences are windows."""
    starts = range(0, n_tokens - 1, sequence or block_size)
    return [(i, min(i + block_size, n_tokens - 1)) for i in starts]


def window_losses(model, tokens, dtype=torch.float32, batch_size=64, sequence=None):
    """The summed losses in nats of the windows of window_spans. Float64 (n_windows,)."""
    device, block_size = next(model.parameters()).device, model.config.block_size
    spans = window_spans(len(tokens), block_size, sequence)
    whole = [i for i, end in spans if end == i + block_size]
    groups = [whole[i:i + batch_size] for i in range(0, len(whole), batch_size)]
    if len(whole) < len(spans):
        groups.append([spans[-1][0]])  # the shorter one at the end
    sums = []
    for group in progress_bar(groups, 'loss'):
        windows = np.stack([tokens[i:i + block_size + 1] for i in group])  # (B, T + 1)
        windows = torch.from_numpy(windows.astype(np.int64)).to(device)
        sums.append(token_losses(model, windows[:, :-1], windows[:, 1:], dtype).sum(dim=1))
    return torch.cat(sums).numpy()


def split_loss(model, tokens, dtype=torch.float32, batch_size=64, sequence=None):
    """The mean loss in nats of the next token over a whole split, by window_losses."""
    spans = window_spans(len(tokens), model.config.block_size, sequence)
    n_targets = sum(end - start for start, end in spans)
    return float(window_losses(model, tokens, dtype, batch_size, sequence).sum() / n_targets)


def ratio_error(totals, sizes):
    """sum(totals) / sum(sizes) over windows in the order of the text, its standard error and how
    many runs of windows that is from: RUNS, or each window where they are fewer. It is that of a
    ratio estimator, in which a window that is shorter, or has fewer bytes, weighs less (Cochran
    1977, "Sampling Techniques", chapter 6), and nan for a single window."""
    value, n = float(totals.sum() / sizes.sum()), min(len(totals), RUNS)
    if n < 2:
        return value, math.nan, n
    starts = np.arange(n) * len(totals) // n
    residuals = np.add.reduceat(totals - value * sizes, starts)  # (n,), of which the sum is 0
    return value, math.sqrt(n / (n - 1) * (residuals ** 2).sum()) / sizes.sum(), n


def ratio(totals, sizes):
    """The value of ratio_error with the 95 % interval of Student's t over its runs; None in place
    of the interval for a single window."""
    value, error, n = ratio_error(totals, sizes)
    if n < 2:
        return value, None
    from scipy.special import stdtrit  # make quick does without it
    margin = float(stdtrit(n - 1, 0.975) * error)
    return value, [value - margin, value + margin]


def wilson(right, n):
    """The share of right answers among n, and its 95 % interval, which stays within 0 and 1."""
    z = 1.959964
    centre, margin = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    low, high = (centre - margin) / (n + z * z), (centre + margin) / (n + z * z)
    return right / n, [max(0.0, low), min(1.0, high)]


def text_scores(model, tokens, tokenizer, dtype, batch_size, sequence=None):
    """The loss, perplexity and bits per byte of a text, each with its interval, a dictionary.
    Bytes are left out where the tokenizer does not know them. Raises UserError where the scores
    are no numbers."""
    sums = window_losses(model, tokens, dtype, batch_size, sequence)
    spans = window_spans(len(tokens), model.config.block_size, sequence)
    sizes = np.array([end - start for start, end in spans])
    loss, interval = ratio(sums, sizes)
    if not max((loss, *(interval or ()))) < 700:  # nan, or more than the exponential can take
        raise UserError(f'the loss is {loss:g}: the weights are damaged, or too large for {dtype}')
    scores = {'tokens': int(sizes.sum()), 'windows': len(sums),
              'loss': loss, 'loss_interval': interval,
              'perplexity': math.exp(loss),
              'perplexity_interval': interval and [math.exp(end) for end in interval]}
    if not tokenizer.knows_bytes:
        return scores
    texts = [tokenizer.to_bytes([i]) for i in range(int(tokens.max()) + 1)]
    # the end of a document stands for no text
    bytes_of = np.array([0 if i == tokenizer.end_of_text or text == b'<|endoftext|>' else len(text)
                         for i, text in enumerate(texts)])
    n_bytes = np.array([bytes_of[tokens[i + 1:end + 1]].sum() for i, end in spans])
    if not n_bytes.any():
        raise UserError('the tokens to predict are ends of documents alone: give a longer text')
    bits, bits_interval = ratio(sums / math.log(2), n_bytes)
    return scores | {'bytes': int(n_bytes.sum()), 'bits_per_byte': bits,
                     'bits_per_byte_interval': bits_interval}


@dataclass
class Question:
    context: list  # token ids
    endings: list  # their token ids, a list for each
    lengths: np.ndarray  # of each ending, in bytes or in characters
    label: int  # which of them is right


def read_row(line, where):
    """A line of JSON -> its dictionary, in which endings and label are sound. Raises UserError,
    which begins with where."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f'{where} is not JSON: {e}') from None
    row = row if isinstance(row, dict) else {}
    context_of(row, where)
    endings, label = row.get('endings'), row.get('label')
    several = isinstance(endings, list) and len(endings) >= 2
    if not several or not all(isinstance(end, str) and end for end in endings):
        raise UserError(f'{where}: endings must be a list of two texts or more, none of them '
                        'empty')
    if type(label) not in (int, str) or str(label) not in map(str, range(len(endings))):
        raise UserError(f'{where}: label={label!r} must be a number from 0 to {len(endings) - 1}, '
                        'that of the right ending')
    return row


def context_of(row, where):
    """What a question's endings go on from, as it stands. Raises UserError, which begins with
    where."""
    parts = [row['ctx']] if 'ctx' in row else [row.get('ctx_a'), row.get('ctx_b')]
    if not all(isinstance(part, str) for part in parts) or not any(parts):
        raise UserError(f'{where} has no text ctx, nor ctx_a and ctx_b')
    return ' '.join(filter(None, parts))


def as_it_stands(row, where, model, tokenizer):
    """The Question of a row, whose text is not changed. Raises UserError, which begins with
    where."""
    context = encode(tokenizer, where, context_of(row, where))
    ids = [encode(tokenizer, where, ' ' + end) for end in row['endings']]
    n_bytes = [len(end.encode('utf-8', errors='replace')) for end in row['endings']]
    return checked_question(context, ids, n_bytes, row, where, model)


def as_the_harness(row, where, model, tokenizer):
    """The Question of a row as lm-evaluation-harness puts it (its tasks/hellaswag/utils.py). Raises
    UserError, which begins with where, for a row that lacks what that needs."""
    parts = [row.get(key) for key in ('activity_label', 'ctx_a', 'ctx_b')]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f'{where} has no text activity_label, ctx_a and ctx_b')
    label, first, second = parts
    text = without_brackets(f'{label}: {first} {second.capitalize()}')
    endings = [without_brackets(ending) for ending in row['endings']]
    if not all(endings):
        raise UserError(f'{where} has an ending of brackets alone')
    context = encode(tokenizer, where, text.rstrip())
    # context and ending are encoded together, as the harness does
    ids = [encode(tokenizer, where, f'{text} {ending}')[len(context):] for ending in endings]
    return checked_question(context, ids, [*map(len, endings)], row, where, model)


def without_brackets(text):
    """text without what WikiHow has left in HellaSwag."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def checked_question(context, ids, lengths, row, where, model):
    """The Question, if the model can take it. Raises UserError."""
    longest, block_size = max(map(len, ids)), model.config.block_size
    if longest >= block_size:
        raise UserError(f'{where} has an ending of {longest} tokens, the model can take '
                        f'block_size - 1 = {block_size - 1}')
    check_ids(max(map(max, [context, *ids])), model.config.vocab_size, where)
    return Question(context, ids, np.array(lengths), int(row['label']))


def read_questions(path, max_questions, model, tokenizer):
    """The first max_questions of a JSON lines file, all for 0, as Questions that stand as they are,
    and as lm-evaluation-harness puts them. The latter are none where one lacks what that needs,
    and a line says so. Empty lines do not count. Raises UserError."""
    rows, questions = [], []
    try:
        with open(path, encoding='utf-8') as f:
            for number, line in enumerate(f, start=1):
                if line.strip():
                    where = f'{path}, line {number}'
                    rows.append((read_row(line, where), where))
                    questions.append(as_it_stands(*rows[-1], model, tokenizer))
                if len(questions) == max_questions > 0:
                    break
    except (OSError, UnicodeError) as e:
        raise UserError(f'hellaswag={path} cannot be read: {e}') from None
    if not questions:
        raise UserError(f'hellaswag={path} is empty: give a file with a question in each line')
    try:
        return questions, [as_the_harness(*row, model, tokenizer) for row in rows]
    except UserError as e:
        print(f'note: no scores as lm-evaluation-harness has them: {e}', file=sys.stderr)
        return questions, []


def ending_losses(model, questions, dtype, batch_size):
    """The summed losses in nats of the endings of each question, a list of float64 arrays
    (n_endings,). The last tokens of a context that is too long are read."""
    device, block_size = next(model.parameters()).device, model.config.block_size
    rows = []  # inputs and targets (T,) of each ending
    for question in questions:
        for ending in question.endings:
            # the last token is predicted and not read
            ids = (question.context + ending)[-block_size - 1:]
            targets = [-1] * (len(ids) - 1 - len(ending)) + ending
            rows.append((torch.tensor(ids[:-1]), torch.tensor(targets)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # so that little is padded
    groups = []
    while order:
        count = batch_size * block_size // len(rows[order[0]][0])
        groups.append(order[:count])
        order = order[count:]
    nats = np.zeros(len(rows))
    for group in progress_bar(groups, 'endings'):
        # padded on the right, where no token looks
        idx = pad_sequence([rows[i][0] for i in group], batch_first=True)
        targets = pad_sequence([rows[i][1] for i in group], batch_first=True, padding_value=-1)
        losses = token_losses(model, idx.to(device), targets.to(device), dtype)
        nats[group] = losses.sum(dim=1).numpy()
    return np.split(nats, np.cumsum([len(q.endings) for q in questions])[:-1])


def question_scores(model, questions, dtype, batch_size, kind=''):
    """acc and acc_norm of Questions, with their intervals, and the share that guessing gets right,
    a dictionary. kind is added to the names of the scores. Raises UserError where the model gives
    no numbers."""
    nats, n = ending_losses(model, questions, dtype, batch_size), len(questions)
    if not all(np.isfinite(loss).all() for loss in nats):
        raise UserError('the loss of an ending is no number: the weights are damaged, or too '
                        f'large for {dtype}')
    answers = list(zip(nats, questions))
    right = sum(int(loss.argmin() == q.label) for loss, q in answers)
    right_norm = sum(int((loss / q.lengths).argmin() == q.label) for loss, q in answers)
    acc, interval = wilson(right, n)
    acc_norm, norm_interval = wilson(right_norm, n)
    chance = float(np.mean([1 / len(q.endings) for q in questions]))
    return {'questions': n, 'chance': chance, f'acc{kind}': acc, f'acc{kind}_interval': interval,
            f'acc_norm{kind}': acc_norm, f'acc_norm{kind}_interval': norm_interval}


def open_text(config, trained):
    """The name of the dataset, the tokens of it to evaluate, and how many of them a sequence has;
    '' and none where questions are named and no dataset is. Raises UserError."""
    if not (config.dataset or trained.dataset):
        if config.hellaswag:
            return '', [], None
        raise UserError(f'model={config.model} does not name the data of its training: give '
                        '--dataset=NAME or --hellaswag=FILE')
    data = trained.open_data(config.dataset)
    tokens = getattr(data, config.split)[:config.max_tokens or None]
    path = data.folder / f'{config.split}.bin'
    if len(tokens) < 2:
        raise UserError(f'{path} has one token, which leaves nothing to predict: give a longer '
                        'text')
    check_ids(tokens.max(), trained.n_vocab, path)
    return data.name, tokens, data.sequence


def print_scores(scores):
    """A table of a line for each score, with its interval."""
    print(f'\n{"":<43}95 % interval')
    for key, form, unit in (('loss', '{:.4f}', 'nats/token'), ('perplexity', '{:.3f}', ''),
                            ('bits_per_byte', '{:.4f}', 'bits/byte'), ('acc', '{:.1%}', ''),
                            ('acc_norm', '{:.1%}', ''), ('acc_harness', '{:.1%}', ''),
                            ('acc_norm_harness', '{:.1%}', '')):
        if key in scores:
            interval, spread = scores[f'{key}_interval'], 'unknown from a single window'
            if interval:
                spread = ' to '.join(map(form.format, interval))
            name = key.replace('_per_', ' per ')
            print(f'{name:<18}{form.format(scores[key]):>12} {unit:<12}{spread}')


def main():
    config, _ = configure(sys.argv[1:], EvaluateConfig, positional=('model',))
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')
    trained = load_model(config.model, device)
    model, tokenizer = trained.model, trained.tokenizer
    dataset, tokens, sequence = open_text(config, trained)
    questions, harness = [], []
    if config.hellaswag:
        questions, harness = read_questions(config.hellaswag, config.max_questions, model,
                                            tokenizer)

    text, choice = {}, {}
    if dataset:
        text = text_scores(model, tokens, tokenizer, dtype, config.batch_size, sequence)
    if questions:
        choice = question_scores(model, questions, dtype, config.batch_size)
    if harness:
        choice |= question_scores(model, harness, dtype, config.batch_size, '_harness')
    if config.json:
        used = {'dataset': dataset, 'dtype': str(dtype).removeprefix('torch.')}
        result = {'model': describe(model), **text, 'hellaswag': choice or None,
                  'settings': asdict(config) | used}
        print(json.dumps(result, indent=2))
        return
    print(describe(model))
    if text:
        n_bytes = f'{text["bytes"]:,} bytes' if 'bytes' in text else (
            f'bytes unknown for {tokenizer.name}')
        print(f'{config.split} split of {dataset}: {text["tokens"]:,} tokens predicted, {n_bytes}, '
              f'windows of {model.config.block_size}: {text["windows"]:,}')
    if choice:
        print(f'{config.hellaswag}: {choice["questions"]:,} questions, of which guessing gets '
              f'{choice["chance"]:.1%}')
    print_scores(text | choice)


if __name__ == '__main__':
    run(main)
