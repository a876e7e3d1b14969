"""
Which heads do induction: attend from a token to what followed its last occurrence.

    python -m analysis.induction_heads out/ckpt.pt
    python -m analysis.induction_heads gpt2 --sequences=100

It needs a model with a context of 4 tokens or more, and no text. The prefix-matching score of a
head is its mean attention, over the second copy of repeated random tokens, to the token after the
same token's first occurrence (Olsson et al. 2022, "In-context Learning and Induction Heads",
appendix "Head Activation Evaluators"). Olsson et al. repeat 25 tokens three times more, behind a
start token. Here there is one repetition and no start token.

A head can copy and look elsewhere: at the token that is s after the first occurrence, if earlier
heads carry there what came before. s is its shift, and 1 the classical one. So the attention at
each shift is scored too, on random tokens of which a stretch comes twice, at a lag that differs in
every sequence. There a head that looks at a fixed distance scores low. A head whose best shift is 0
looks at the token itself: a duplicate-token head (Wang et al. 2023, section 3), which cannot copy.
"""

from dataclasses import dataclass, replace

from configurator import UserError, run

import numpy as np
import torch

from analysis.plots import Panel, draw_panels, field_maps
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import record, repeated_tokens
from runtime.progress import progress_bar

MOST_SHIFTS = 12


@dataclass
class Config(AnalysisConfig):
    sequences: int = 50  # random sequences
    length: int = 50  # tokens in a copy, of two; at most half of the context
    threshold: float = 0.4  # the table has the heads that score above
    least = dict(sequences=1, length=2)


@dataclass
class Induction:
    scores: np.ndarray  # (n_layer, n_head) mean prefix-matching score, 0 to 1
    spread: np.ndarray  # (n_layer, n_head) standard deviation over sequences
    length: int  # tokens in a copy
    threshold: float
    shifted: np.ndarray  # (n_layer, n_head, shifts) mean attention at each shift, from 0
    best_shift: np.ndarray  # (n_layer, n_head) the shift, of 1 and more, with most attention
    chance: float  # the prefix-matching score of even attention
    chance_shifted: float  # the mean attention of even attention to any one shift

    def best(self):
        """(n_layer, n_head) the mean attention at best_shift."""
        return best_shifts(self.shifted)[1]


def copy_length(model, length):
    """length, or half of the context if that is less. Raises UserError where no two copies fit."""
    block_size = model.config.block_size
    if block_size < 4:
        raise UserError(f'block_size={block_size} has no room for two copies of two tokens: take a '
                        'model with 4 or more')
    return min(length, block_size // 2)


def batch_size(model, length):
    """How many sequences of length tokens to run at once: the attention patterns of one block take
    at most 64 MB, unless one sequence alone takes more."""
    return max(1, min(16, 2 ** 24 // (model.config.n_head * length ** 2)))


@dataclass
class Copies:
    """Random sequences in which a stretch comes twice."""
    idx: torch.Tensor  # (sequences, T)
    first: torch.Tensor  # (sequences,) where the stretch begins
    lag: torch.Tensor  # (sequences,) how much later it comes again: length and n_shifts, or more
    length: int  # tokens in the stretch
    n_shifts: int  # shifts that are scored, from 0

    def repeat(self):
        """Write the stretch into idx where it comes again."""
        self.idx.scatter_(1, self.queries(), self.idx.gather(1, self.keys()[..., 0]))

    def queries(self):
        """The places (sequences, length) of the second copy."""
        return (self.first + self.lag)[:, None] + torch.arange(self.length)

    def keys(self):
        """The places (sequences, length, n_shifts) at each shift from the first occurrence."""
        places = self.first[:, None] + torch.arange(self.length)
        return places[..., None] + torch.arange(self.n_shifts)


def copies_with_lags(model, n_vocab, sequences, seed):
    """Copies for a model: at most 64 tokens, a fourth of them in the stretch."""
    T = min(64, model.config.block_size)
    length = max(2, T // 4)
    n_shifts = max(2, min(MOST_SHIFTS, 3 * T // 8))
    least = max(length, n_shifts)
    rng = np.random.default_rng(seed)
    first = rng.integers(T - length - least + 1, size=sequences)
    lag = rng.integers(least, T - length - first + 1)
    idx = repeated_tokens(n_vocab, sequences, T, seed)[:, :T]
    copies = Copies(idx, torch.from_numpy(first), torch.from_numpy(lag), length, n_shifts)
    copies.repeat()
    return copies


def attention_at_shifts(pattern, copies):
    """The mean attention (B, n_head, n_shifts) of a pattern (B, n_head, T, T) over copies of as
    many sequences, from the second copy to each shift from the first occurrence."""
    rows = torch.arange(len(pattern))[:, None, None]
    found = pattern.cpu()[rows, :, copies.queries()[..., None], copies.keys()]
    return found.mean(1).mT  # of (B, length, n_shifts, n_head)


def best_shifts(shifted):
    """The shift, of 1 and more, to which each head attends most, and how much: (n_layer, n_head)
    both, of shifted (n_layer, n_head, shifts)."""
    at = 1 + shifted[..., 1:].argmax(-1)
    return at, np.take_along_axis(shifted, at[..., None], -1)[..., 0]


def shift_scores(subject, copies):
    """The mean attention (n_layer, n_head, shifts) at each shift."""
    model, c, sequences = subject.model, subject.model.config, len(copies.idx)
    total = torch.zeros(c.n_layer, c.n_head, copies.n_shifts, dtype=torch.float64)
    size = batch_size(model, copies.idx.size(1))
    for start in range(0, sequences, size):
        part = replace(copies, idx=copies.idx[start:start + size],
                       first=copies.first[start:start + size], lag=copies.lag[start:start + size])
        for block in record(model, part.idx.to(subject.device)):
            total[block.layer] += attention_at_shifts(block.pattern(), part).sum(0)
    return (total / sequences).numpy()


def patterns_over_copies(subject, config, n, what):
    """Run the model on config.sequences of n random tokens, each twice, one batch at a time. Yield
    the number of a batch's first sequence, the layer, and the layer's attention patterns
    (B, n_head, 2 n, 2 n)."""
    idx = repeated_tokens(subject.n_vocab, config.sequences, n, config.seed).to(subject.device)
    size = batch_size(subject.model, 2 * n)
    for start in progress_bar(range(0, len(idx), size), what):
        for block in record(subject.model, idx[start:start + size]):
            yield start, block.layer, block.pattern()


def analyse(subject, config):
    model = subject.model
    n = copy_length(model, config.length)
    scores = np.zeros((config.sequences, model.config.n_layer, model.config.n_head))
    for start, layer, pattern in patterns_over_copies(subject, config, n, 'induction'):
        # from position n + i of the second copy to i + 1, which followed the same token
        matches = pattern.diagonal(1 - n, -2, -1)[..., 1:]  # (B, n_head, n)
        scores[start:start + len(matches), layer] = matches.mean(-1).cpu()
    copies = copies_with_lags(model, subject.n_vocab, config.sequences, config.seed)
    shifted = shift_scores(subject, copies)
    # even attention gives a share of 1 / (t + 1) to each token that the one at t sees
    chance = (1 / np.arange(n + 1, 2 * n + 1)).mean()
    chance_shifted = (1 / (copies.queries() + 1.0)).mean().item()
    return Induction(scores.mean(0), scores.std(0), n, config.threshold, shifted,
                     best_shifts(shifted)[0], float(chance), chance_shifted)


def table(result):
    best = result.best()
    above = top_heads(np.maximum(result.scores, best), threshold=result.threshold)
    if not above:
        layer, head = top_heads(result.scores, 1)[0]
        return (f'no head scores above {result.threshold:g}; the highest is '
                f'{result.scores[layer, head]:.3f} (head {layer}.{head}), '
                f'2 x {result.length} tokens\neven attention scores {result.chance:.3f}')
    lines = [f'{"head":>6}{"prefix matching":>18}{"spread":>9}{"best shift":>13}{"score":>9}      '
             f'above {result.threshold:g}']
    for layer, head in above:
        lines.append(f'{f"{layer}.{head}":>6}{result.scores[layer, head]:>18.3f}'
                     f'{result.spread[layer, head]:>9.3f}{result.best_shift[layer, head]:>13}'
                     f'{best[layer, head]:>9.3f}')
    return '\n'.join(lines)


def plot(results):
    best = {name: result.best() for name, result in results.items()}
    first = next(iter(results.values()))
    return draw_panels('Induction heads: attention to what followed the same token',
                       [Panel('prefix-matching score', field_maps(results, 'scores'),
                              'mean attention', 0, 1, chance=first.chance),
                        Panel('at the best shift, with lags that differ', best,
                              'mean attention', 0, 1, chance=first.chance_shifted)])


if __name__ == '__main__':
    run(lambda: main('induction_heads', Config, analyse, table, plot))
