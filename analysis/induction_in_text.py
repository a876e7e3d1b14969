"""
What induction heads do in a text: do they attend to what followed, and which predictions need them?

    python -m analysis.induction_in_text out/ckpt.pt
    python -m analysis.induction_in_text out/ckpt.pt --text=FILE:book.txt

It needs a text: the data that the model was trained on, a dataset, or a file. Let a token come
again, the last time before at j. What followed it then, at j + 1, is what an induction head attends
to and predicts (Olsson et al. 2022). The next token is one of three:

    repeat          it is the one at j + 1
    elsewhere       it came before in the window, but not there: no induction predicts it, and a
                    head that copies whatever came before does
    new             it did not come before in the window

    attention       of a head to j + 1, mean over the tokens that come again
    expected        the same of the head's mean pattern, which knows places and no tokens
    named heads     those behind the first layer that attend to a shift from the first occurrence in
                    random tokens (induction_heads.py), from a mean attention of threshold
    rise            of the loss, with the named heads at their means over the text (ablation.py)

    difference      how much more a repeat loses than the same token when it comes from elsewhere,
                    mean over the repeats of tokens that come as both

A head does induction if the difference is above 0. Line breaks, for instance, are often repeats and
often foreseen by other means, which says nothing while they are compared with line breaks. Which
repeats need the heads is said by kind of token, and by the tokens whose losses rise most in sum.
"""

from dataclasses import dataclass

from configurator import run

import numpy as np
import torch

from analysis.ablation import mean_outputs
from analysis.induction_circuit import names_of, without
from analysis.induction_heads import best_shifts, copies_with_lags, copy_length, shift_scores
from analysis.plots import Panel, draw_panels, field_maps, symmetric
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import final_stream, record
from evaluate import RUNS, ratio_error, stream_losses
from runtime.progress import progress_bar

TOKENS = 10  # in the table


@dataclass
class Config(AnalysisConfig):
    text: str = ''  # FILE:book.txt or a dataset; '': the val split that the checkpoint names
    max_tokens: int = 16384  # of the text, in windows of the context's length
    sequences: int = 100  # random sequences, from which heads are named
    threshold: float = 0.4  # mean attention from which a head is named
    least = dict(max_tokens=2, sequences=1)


@dataclass
class InText:
    attention: np.ndarray  # (n_layer, n_head) to what followed the same token, 0 to 1
    expected: np.ndarray  # (n_layer, n_head) from places alone
    random: np.ndarray  # (n_layer, n_head) attention at the best shift, on random tokens
    named: list  # names of heads
    shares: dict  # of 'repeat', 'elsewhere' and 'new' among the tokens
    loss: dict  # of each in nats, of the whole model
    rise: dict  # of each without the named heads, and 'difference'; nan where none is named
    error: dict  # standard errors of rise
    alone: np.ndarray  # (n_layer, n_head) that difference without one head; nan where that was not
                       # asked: of a model with more than 64 heads the named ones are
    alone_error: np.ndarray
    kinds: dict  # of repeats, by kind of token: their count, and the mean rise
    tokens: list  # (token, count, rise) of the tokens whose losses rise most in sum
    n_windows: int


def find_repeats(idx):
    """For idx (B, T + 1): the place (B, T) behind the last earlier occurrence of each of the first
    T tokens, 0 where there is none, and which of the next tokens are of each kind, (B, T)."""
    T = idx.size(1) - 1
    tokens, place = idx[:, :-1], torch.arange(T, device=idx.device)
    earlier = place[:, None] > place  # (T, T)
    is_same = (tokens[:, :, None] == tokens[:, None, :]) & earlier  # (B, T, T)
    behind = torch.where(is_same, place + 1, 0).amax(-1)  # (B, T)
    repeat = (behind > 0) & (idx.gather(1, behind) == idx[:, 1:])
    came = ((idx[:, 1:, None] == tokens[:, None, :]) & (place[:, None] >= place)).any(-1)
    return behind, {'repeat': repeat, 'elsewhere': came & ~repeat, 'new': ~came}


def attention_to(model, windows, places):
    """The mean attention (n_layer, n_head) in windows to the places behind the last occurrence,
    which find_repeats gives, and the mean of the mean pattern at the same places. The token itself
    does not count, as it would where a token comes twice in a row."""
    n_layer, n_head = model.config.n_layer, model.config.n_head
    found, patterns, weights = torch.zeros(n_layer, n_head).double(), [0] * n_layer, 0
    for idx, behind in zip(progress_bar(windows, 'attention'), places):
        T = behind.size(1)
        counts = (behind > 0) & (behind < torch.arange(T, device=idx.device))
        chosen = torch.nn.functional.one_hot(behind, T) * counts[..., None]  # (B, T, T)
        weights = weights + chosen.sum(0).double()
        for block in record(model, idx[:, :-1]):
            pattern = block.pattern()
            found[block.layer] += torch.einsum('bhts,bts->h', pattern, chosen.float()).cpu()
            patterns[block.layer] = patterns[block.layer] + pattern.sum(0).double()
    n = sum(len(idx) for idx in windows)
    expected = torch.stack([(pattern / n * weights).sum((-2, -1)) for pattern in patterns])
    total = weights.sum().item()
    return (found / total).numpy(), (expected / total).cpu().numpy()


def kind_of(text):
    """What kind of token a text is."""
    if '\n' in text:
        return 'line break'
    if text.isupper() and len(text) > 1:
        return 'capitals'
    if text[:1].isspace() and text.strip():
        return 'begins a word'
    return 'in a word' if text.isalpha() else 'other'


def losses_of(model, idx, taps=None):
    """The loss in nats (B, T) of each prediction in idx (B, T + 1). taps are record's."""
    return stream_losses(model, final_stream(record(model, idx[:, :-1], taps)), idx[:, 1:])


def mean_over(values, chosen):
    """The mean of values (windows, T) where they are chosen, and its standard error; nan where
    none is."""
    if not chosen.any():
        return np.nan, np.nan
    return ratio_error((values * chosen).sum(1).numpy(), chosen.sum(1).numpy())[:2]


def difference(values, targets, groups):
    """How much larger values (windows, T) are for repeats than for the same targets (windows, T)
    from elsewhere, mean over repeats, and its standard error by the jackknife over blocks of
    neighbouring windows. nan where no token comes as both."""
    ids = targets.unique(return_inverse=True)[1]
    n = int(ids.max()) + 1
    parts = []  # of each block: sums and counts, of repeats and of elsewhere, (4, n)
    for block in torch.arange(len(values)).tensor_split(min(RUNS, len(values))):
        part = []
        for kind in ('repeat', 'elsewhere'):
            chosen = groups[kind][block]
            where = ids[block][chosen]
            part += [torch.bincount(where, weights, n)
                     for weights in (values[block][chosen], torch.ones(len(where)).double())]
        parts.append(torch.stack(part))
    parts = torch.stack(parts)

    def estimate(sums):
        a, n_a, b, n_b = sums[:, (sums[1] > 0) & (sums[3] > 0)]
        return ((a / n_a - b / n_b) * n_a).sum() / n_a.sum()
    left_out = torch.stack([estimate(parts.sum(0) - part) for part in parts])
    spread = (left_out - left_out.mean()).square().mean() * (len(parts) - 1)
    return estimate(parts.sum(0)).item(), spread.sqrt().item()


def rises(values, targets, groups):
    """The mean and the standard error of values (windows, T) over each group, and of difference():
    two dictionaries."""
    found = {kind: mean_over(values, chosen) for kind, chosen in groups.items()}
    found['difference'] = difference(values, targets, groups)
    return tuple({kind: pair[i] for kind, pair in found.items()} for i in (0, 1))


def most_helped(targets, rise, tokenizer):
    """The kinds of targets (n,) and the tokens whose losses rise most in sum, by rise (n,)."""
    ids, where = targets.unique(return_inverse=True)
    counts = torch.bincount(where)
    sums = torch.zeros(len(ids), dtype=torch.float64).index_add(0, where, rise)
    texts = [tokenizer.decode([i]) for i in ids.tolist()]
    kinds = {}
    for text, count, total in zip(texts, counts.tolist(), sums.tolist()):
        n, before = kinds.get(kind_of(text), (0, 0.0))
        kinds[kind_of(text)] = n + count, before + total
    first = sums.argsort(descending=True)[:TOKENS].tolist()
    return ({kind: {'count': n, 'rise': total / n} for kind, (n, total) in kinds.items()},
            [(texts[i], counts[i].item(), (sums[i] / counts[i]).item()) for i in first])


def analyse(subject, config):
    model, c = subject.model, subject.model.config
    copy_length(model, 2)  # raises where no two copies fit
    copies = copies_with_lags(model, subject.n_vocab, config.sequences, config.seed)
    random = best_shifts(shift_scores(subject, copies))[1]
    named = [head for head in top_heads(random, threshold=config.threshold) if head[0] > 0]
    windows = subject.windows(config.text, config.max_tokens, min(c.block_size, config.max_tokens))
    places, groups = zip(*map(find_repeats, windows))
    attention, expected = attention_to(model, windows, places)
    means = mean_outputs(model, [idx[:, :-1] for idx in windows])
    groups = {kind: torch.cat([group[kind] for group in groups]).cpu() for kind in groups[0]}
    targets = torch.cat([idx[:, 1:] for idx in windows]).cpu()
    whole = torch.cat([losses_of(model, idx) for idx in windows])

    def rise_without(heads):
        """How much each loss (windows, T) rises with heads at their means."""
        taps = without(means, heads)
        return torch.cat([losses_of(model, idx, taps) for idx in windows]) - whole

    alone, alone_error = np.full((2, c.n_layer, c.n_head), np.nan)
    asked = list(np.ndindex(alone.shape)) if alone.size <= 64 else named
    for head in progress_bar(asked, 'without a head'):
        alone[head], alone_error[head] = difference(rise_without([head]), targets, groups)
    rise = rise_without(named) if named else torch.full_like(whole, torch.nan)
    kinds, tokens = {}, []
    if named and subject.tokenizer.knows_text:
        repeats = groups['repeat']
        kinds, tokens = most_helped(targets[repeats], rise[repeats], subject.tokenizer)
    return InText(attention, expected, random, names_of(named),
                  {kind: group.double().mean().item() for kind, group in groups.items()},
                  {kind: mean_over(whole, group)[0] for kind, group in groups.items()},
                  *rises(rise, targets, groups), alone, alone_error, kinds, tokens, len(whole))


def table(result):
    lines = [f'{"head":>6}{"attention":>12}{"expected":>11}{"on random tokens":>19}'
             f'{"difference without it":>25}']
    for place in top_heads(result.attention - result.expected, 8):
        name = f'{place[0]}.{place[1]}'
        lines.append(f'{name:>6}{result.attention[place]:>12.3f}{result.expected[place]:>11.3f}'
                     f'{result.random[place]:>19.3f}{result.alone[place]:>+15.4f} +- '
                     f'{result.alone_error[place]:.4f}')
    named = ' '.join(result.named)
    lines += ['', f'{"next token":<14}{"share":>8}{"loss":>9}' +
              f'     rise without {named}' * bool(named)]
    for kind, loss in result.loss.items():
        rise = f'{result.rise[kind]:>+12.4f} +- {result.error[kind]:.4f}' * bool(named)
        lines.append(f'{kind:<14}{result.shares[kind]:>8.1%}{loss:>9.3f}{rise}')
    lines[-1] += f'     nats, {result.n_windows:,} windows'
    if not named:
        return '\n'.join([*lines, 'no head behind the first layer does induction on random tokens'])
    lines.append(f'{"difference":<31}{result.rise["difference"]:>+12.4f} +- '
                 f'{result.error["difference"]:.4f}     repeat less the same from elsewhere')
    for kind, found in sorted(result.kinds.items(), key=lambda item: -item[1]['rise']):
        lines.append(f'  {kind:<14}{found["count"]:>8,} repeats{found["rise"]:>+9.4f} nats each')
    if result.tokens:
        lines.append('helped most in sum: ' + ', '.join(
            f'{text!r} {count} x {each:+.2f}' for text, count, each in result.tokens))
    return '\n'.join(lines)


def plot(results):
    alone = field_maps(results, 'alone')
    end = symmetric(alone)
    return draw_panels('Induction in a text', [
        Panel('attention to what followed the same token', field_maps(results, 'attention'),
              'mean attention', 0, 1),
        Panel('the same, from places alone', field_maps(results, 'expected'), 'mean attention',
              0, 1),
        Panel('at the best shift, on random tokens', field_maps(results, 'random'),
              'mean attention', 0, 1),
        Panel('loss of repeats without the head, less elsewhere', alone, 'nats', -end, end,
              'RdBu_r')])


if __name__ == '__main__':
    run(lambda: main('induction_in_text', Config, analyse, table, plot))
