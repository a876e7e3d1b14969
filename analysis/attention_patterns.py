"""
Where heads look: to the previous, current, first or duplicate token, or to many at once.

    python -m analysis.attention_patterns out/ckpt.pt
    python -m analysis.attention_patterns gpt2 --prompt="To be, or not to be" --heads=0.1,3.2

It needs a model and no text. The scores are mean attention over repeated random tokens, as in
induction_heads. Duplicate-token attention goes from the second copy to the same token in the
first. The entropy of a pattern's rows is given in nats, and as a share of the entropy of attention
that is spread evenly. The first position has no choice, so it does not count.
"""

from dataclasses import dataclass, field

from configurator import UserError, run

import numpy as np
import torch

from analysis.induction_heads import Config as InductionConfig
from analysis.induction_heads import copy_length, patterns_over_copies
from analysis.plots import Panel, draw_panels, field_maps, set_title, token_labels
from analysis.program import main, read_heads, top_heads
from analysis.record import record
from runtime.figures import Figure


@dataclass
class Config(InductionConfig):
    threshold: float = 0.3  # the table has the heads that score above, of each kind
    prompt: str = ''  # a text or FILE:prompt.txt: draw the patterns of some heads over it,
        # attention_patterns_prompt.png
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
    prompt_tokens: list = field(default_factory=list)  # texts of the prompt's tokens, if any
    prompt_patterns: dict = field(default_factory=dict)  # layer.head -> pattern over them (T, T)


KINDS = {'previous': 'previous token', 'current': 'current token', 'first': 'first token',
         'duplicate': 'duplicate token'}


def row_entropy(pattern):
    """The entropy of each row of pattern (..., T, T), in nats: (..., T)."""
    return -torch.special.xlogy(pattern, pattern).sum(-1)


def analyse(subject, config):
    c = subject.model.config
    n = copy_length(subject.model, config.length)
    # the largest entropy of each row but the first
    most = torch.arange(2, 2 * n + 1, device=subject.device).log()
    fields = (*KINDS, 'entropy', 'relative_entropy')
    sums = {name: np.zeros((c.n_layer, c.n_head)) for name in fields}
    for _, layer, pattern in patterns_over_copies(subject, config, n, 'patterns'):
        entropy = row_entropy(pattern)[..., 1:]  # (B, n_head, T - 1)
        found = {'previous': pattern.diagonal(-1, -2, -1),
                 'current': pattern.diagonal(0, -2, -1)[..., 1:],
                 'first': pattern[..., 1:, 0],
                 'duplicate': pattern.diagonal(-n, -2, -1),
                 'entropy': entropy,
                 'relative_entropy': entropy / most}
        for name, values in found.items():
            sums[name][layer] += values.mean(-1).sum(0).cpu().numpy()
    means = {name: total / config.sequences for name, total in sums.items()}
    result = Patterns(**means, threshold=config.threshold)
    if config.prompt:
        result.prompt_tokens, result.prompt_patterns = over_prompt(subject, config, result)
    return result


def over_prompt(subject, config, result):
    """The texts of the tokens of config.prompt, and the pattern (T, T) of each head that is to be
    drawn, by its name. Raises UserError."""
    c = subject.model.config
    if config.heads:
        heads = read_heads('heads', config.heads, c)
    else:
        heads = [top_heads(getattr(result, kind), 1)[0] for kind in KINDS]
    ids = subject.tokens('prompt', config.prompt)
    if len(ids) > c.block_size:
        raise UserError(f'prompt has {len(ids)} tokens, which do not fit into '
                        f'block_size={c.block_size}: give a shorter one')
    patterns = {}
    for block in record(subject.model, torch.tensor([ids], device=subject.device)):
        for layer, head in heads:
            if layer == block.layer:
                patterns[f'{layer}.{head}'] = block.pattern()[0, head].cpu().numpy()
    return token_labels(subject.tokenizer, ids), patterns


def table(result):
    lines = []
    for kind, name in KINDS.items():
        scores = getattr(result, kind)
        heads = top_heads(scores, 8, result.threshold)
        layer, head = top_heads(scores, 1)[0]
        none = f'none above {result.threshold:g}; {layer}.{head} {scores[layer, head]:.2f}'
        found = '  '.join(f'{layer}.{head} {scores[layer, head]:.2f}' for layer, head in heads)
        lines.append(f'{name:>16}   {found or none}')
    entropies = '  '.join(f'{mean:.2f}' for mean in result.relative_entropy.mean(1))
    lines.append(f'{"entropy":>16}   {entropies}   by layer, share of that of even attention')
    return '\n'.join(lines)


def plot(results):
    panels = [Panel(name, field_maps(results, kind), 'mean attention', 0, 1)
              for kind, name in KINDS.items()]
    entropies = field_maps(results, 'relative_entropy')
    panels.append(Panel('entropy', entropies, 'share of even', 0, 1))
    return draw_panels('Where heads look, over repeated random tokens', panels)


def plot_prompt(label, result):
    """A Figure of the patterns over the prompt; None where there was none."""
    if not result.prompt_tokens:
        return None
    labels, n_patterns = result.prompt_tokens, len(result.prompt_patterns)
    columns = min(n_patterns, 3)
    rows = -(-n_patterns // columns)
    size = max(3.2, 0.16 * len(labels) + 1)
    figure = Figure(figsize=(size * columns + 1, size * rows + 0.6), layout='constrained')
    set_title(figure, f'Attention patterns of {label}')
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[n_patterns:]:
        ax.axis('off')
    for ax, (head, pattern) in zip(axes.flat, result.prompt_patterns.items()):
        image = ax.imshow(pattern, vmin=0, vmax=1, cmap='Blues')
        ax.set_title(f'head {head}', fontsize=9)
        ticks = range(len(labels))
        ax.set_xticks(ticks, labels, rotation=90, fontsize=7, parse_math=False)
        ax.set_yticks(ticks, labels, fontsize=7, parse_math=False)
        ax.set(xlabel='attended token', ylabel='attending token')
    figure.colorbar(image, ax=axes, label='attention', shrink=0.8)
    return figure


if __name__ == '__main__':
    run(lambda: main('attention_patterns', Config, analyse, table, plot, plot_prompt))
