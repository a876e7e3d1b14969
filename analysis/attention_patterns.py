"""
Where heads look: to the previous, current, first or duplicate token, or to many at once.

Mean attention over repeated random tokens, as in induction_heads. Duplicate-token attention is that of the second copy to
the same token in the first. The entropy of a pattern's rows is given in nats and as a share of its largest value, that of
attention spread evenly. Positions that have no choice (the first one) do not count.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis.induction_heads import Config as InductionConfig
from analysis.induction_heads import copy_length, patterns_over_copies
from analysis.plots import Panel, draw_panels, token_labels
from analysis.program import main, top_heads
from analysis.record import record
from configurator import UserError, run


@dataclass
class Config(InductionConfig):
    threshold: float = 0.3  # the table has the heads that score above, of each kind
    prompt: str = ''  # a text or FILE:prompt.txt: draw the patterns of some heads over it, attention_patterns_prompt.png
    heads: str = ''  # which heads, such as 5.1,6.9; '': the strongest of each kind

    def __post_init__(self):
        super().__post_init__()
        if self.heads and not self.prompt:
            raise ValueError(f'heads={self.heads!r} are drawn over a prompt: give one')


@dataclass
class Patterns:
    previous: np.ndarray  # (n_layer, n_head) mean attention to the token before
    current: np.ndarray  # to the token itself
    first: np.ndarray  # to the first token
    duplicate: np.ndarray  # from the second copy to the same token in the first
    entropy: np.ndarray  # (n_layer, n_head) mean over positions, nats
    relative_entropy: np.ndarray  # as a share of the entropy of even attention
    threshold: float
    prompt_tokens: list = field(default_factory=list)  # texts of the tokens of the prompt, if there was one
    prompt_patterns: dict = field(default_factory=dict)  # layer.head -> its pattern over them (T, T)


KINDS = {'previous': 'previous token', 'current': 'current token', 'first': 'first token', 'duplicate': 'duplicate token'}


def row_entropy(pattern):
    """Of each row of pattern (..., T, T), in nats: (..., T)"""
    return -torch.special.xlogy(pattern, pattern).sum(-1)


def analyse(subject, config):
    model = subject.model
    n = copy_length(model, config.length)
    choices = torch.arange(2, 2 * n + 1, device=subject.device).log()  # the largest entropy of each row but the first
    sums = {kind: np.zeros((model.config.n_layer, model.config.n_head)) for kind in (*KINDS, 'entropy', 'relative_entropy')}
    for _, layer, pattern in patterns_over_copies(subject, config, n, 'patterns'):
        entropy = row_entropy(pattern)[..., 1:]  # (B, n_head, T - 1)
        found = {'previous': pattern.diagonal(-1, -2, -1), 'current': pattern.diagonal(0, -2, -1)[..., 1:],
                 'first': pattern[..., 1:, 0], 'duplicate': pattern.diagonal(-n, -2, -1),
                 'entropy': entropy, 'relative_entropy': entropy / choices}
        for kind, values in found.items():
            sums[kind][layer] += values.mean(-1).sum(0).cpu().numpy()
    result = Patterns(**{kind: total / config.sequences for kind, total in sums.items()}, threshold=config.threshold)
    if config.prompt:
        result.prompt_tokens, result.prompt_patterns = over_prompt(subject, config, result)
    return result


def read_heads(text, n_layer, n_head):
    """'5.1,6.9' -> [(5, 1), (6, 9)]. Raises UserError."""
    pairs = []
    for part in text.split(','):
        layer, dot, head = part.strip().partition('.')
        if not (dot and layer.isdecimal() and head.isdecimal() and int(layer) < n_layer and int(head) < n_head):
            raise UserError(f'heads={text!r} must be heads as layer.head, from 0.0 to {n_layer - 1}.{n_head - 1}, with commas '
                            'between them')
        pairs.append((int(layer), int(head)))
    return pairs


def table(result):
    lines = []
    for kind, name in KINDS.items():
        scores = getattr(result, kind)
        heads = top_heads(scores, 8, result.threshold)
        best = top_heads(scores, 1)[0]
        found = '  '.join(f'{layer}.{head} {scores[layer, head]:.2f}' for layer, head in heads)
        lines.append(f'{name:>16}   {found or f"none above {result.threshold:g}; {best[0]}.{best[1]} {scores[best]:.2f}"}')
    entropies = '  '.join(f'{mean:.2f}' for mean in result.relative_entropy.mean(1))
    return '\n'.join(lines + [f'{"entropy":>16}   {entropies}   by layer, share of that of even attention'])


def plot(results):
    panels = [Panel(name, {label: getattr(result, kind) for label, result in results.items()}, 'mean attention', 0, 1)
              for kind, name in KINDS.items()]
    panels.append(Panel('entropy', {label: result.relative_entropy for label, result in results.items()},
                        'share of even', 0, 1, 'magma'))
    return draw_panels('Where heads look, over repeated random tokens', panels)


def over_prompt(subject, config, result):
    """The texts of the tokens of config.prompt, and by its name the pattern (T, T) of each head that is to be drawn."""
    c = subject.model.config
    heads = read_heads(config.heads, c.n_layer, c.n_head) if config.heads else list(dict.fromkeys(
        top_heads(getattr(result, kind), 1)[0] for kind in KINDS))
    ids = subject.tokens('prompt', config.prompt)
    if len(ids) > c.block_size:
        raise UserError(f'prompt has {len(ids)} tokens, which do not fit into block_size={c.block_size}: give a shorter one')
    patterns = {f'{block.layer}.{head}': block.pattern()[0, head].cpu().numpy()
                for block in record(subject.model, torch.tensor([ids], device=subject.device))
                for layer, head in heads if layer == block.layer}
    return token_labels(subject.tokenizer, ids), patterns


def plot_prompt(label, result):
    """A Figure of the patterns over the prompt; None where there was none."""
    if not result.prompt_tokens:
        return None
    labels, columns = result.prompt_tokens, min(len(result.prompt_patterns), 3)
    size, rows = max(3.2, 0.16 * len(labels) + 1), -(-len(result.prompt_patterns) // columns)
    figure = Figure(figsize=(size * columns + 1, size * rows + 0.6), layout='constrained')
    figure.suptitle(f'Attention patterns of {label}', fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(result.prompt_patterns):]:
        ax.axis('off')
    for ax, (head, pattern) in zip(axes.flat, result.prompt_patterns.items()):
        image = ax.imshow(pattern, vmin=0, vmax=1, cmap='Blues')
        ax.set_title(f'head {head}', fontsize=9)
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
        ax.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
        ax.set(xlabel='attended token', ylabel='attending token')
    figure.colorbar(image, ax=axes, label='attention', shrink=0.8)
    return figure


if __name__ == '__main__':
    run(lambda: main('attention_patterns', Config, analyse, table, plot, plot_prompt))
