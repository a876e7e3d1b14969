"""
Which heads do induction: attend from a token to what followed its last occurrence.

    python -m analysis.induction_heads out/ckpt.pt
    python -m analysis.induction_heads gpt2 --sequences=100

It needs a model with a context of 4 tokens or more, and no text. The prefix-matching score of a
head is its mean attention, over the second copy of repeated random tokens, to the token after the
same token's first occurrence (Olsson et al. 2022, "In-context Learning and Induction Heads",
appendix "Head Activation Evaluators"). Olsson et al. repeat 25 tokens three times more, behind a
start token. Here there is one repetition and no start token.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np

from analysis.plots import Panel, draw_panels, field_maps
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import record, repeated_tokens
from runtime.progress import progress_bar


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
    return Induction(scores.mean(0), scores.std(0), n, config.threshold)


def table(result):
    above = top_heads(result.scores, threshold=result.threshold)
    if not above:
        layer, head = top_heads(result.scores, 1)[0]
        return (f'no head scores above {result.threshold:g}; the highest is '
                f'{result.scores[layer, head]:.3f} (head {layer}.{head}), '
                f'2 x {result.length} tokens')
    lines = [f'{"head":>6}{"prefix matching":>18}{"spread":>9}      2 x {result.length} tokens, '
             f'above {result.threshold:g}']
    for layer, head in above:
        lines.append(f'{f"{layer}.{head}":>6}{result.scores[layer, head]:>18.3f}'
                     f'{result.spread[layer, head]:>9.3f}')
    return '\n'.join(lines)


def plot(results):
    scores = field_maps(results, 'scores')
    return draw_panels('Induction heads: attention to what followed the same token before',
                       [Panel('prefix-matching score', scores, 'mean attention', 0, None)])


if __name__ == '__main__':
    run(lambda: main('induction_heads', Config, analyse, table, plot))
