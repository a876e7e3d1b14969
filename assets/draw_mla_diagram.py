"""Draw assets/mla_diagram.png: where keys and values come from in MHA and in MLA (make assets)."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

GREY, BLUE, ORANGE, GREEN = '#eeeeee', '#cfe2f3', '#f9cb9c', '#d9ead3'


def box(ax, x, y, text, color, width=1.5, bold=False, style='solid'):
    edge, line = ('#b45f06', 2.5) if bold else ('#666666', 1)
    ax.add_patch(FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, facecolor=color,
                                boxstyle='round,pad=0.02,rounding_size=0.1', edgecolor=edge,
                                linewidth=line, linestyle=style))
    ax.text(x, y, text, ha='center', va='center', fontsize=10)


def arrow(ax, start, end, label='', side=0.12, style='solid'):
    ax.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color='#444444', linewidth=1.2,
                                                shrinkA=0, shrinkB=0, linestyle=style))
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        ax.text(x + side, y, label, fontsize=10, va='center', ha='left' if side > 0 else 'right',
                color='#444444')


def column(ax, title, latent):
    top, keys, c, bottom = 5.0, 3.4, 1.9, 0.4
    box(ax, 3, bottom, '$x$: residual stream after ln_1, n_embd', GREY, width=5.6)
    box(ax, 1, keys, '$q$: n_embd', BLUE)
    box(ax, 3, keys, '$k$: n_embd', GREEN if latent else ORANGE, bold=not latent)
    box(ax, 5, keys, '$v$: n_embd', GREEN if latent else ORANGE, bold=not latent)
    box(ax, 3, top, 'softmax$(q\\,k^T / \\sqrt{\\mathrm{head\\_dim}})\\;v$   per head, then $W_O$',
        GREY, width=5.6)
    arrow(ax, (1, bottom + 0.32), (1, keys - 0.32), '$W_Q$')
    if latent:
        box(ax, 4.3, c, '$c$: n_latent', ORANGE, width=1.6, bold=True)
        arrow(ax, (4.3, bottom + 0.32), (4.3, c - 0.32), '$W_E$  (latent_enc)')
        arrow(ax, (4.1, c + 0.32), (3.2, keys - 0.32), '$W_K$', side=0.12)
        arrow(ax, (4.5, c + 0.32), (5, keys - 0.32), '$W_V$', side=0.15)
        box(ax, 2.45, c, '$r$: n_rotary', ORANGE, width=1.5, bold=True, style='dashed')
        arrow(ax, (2.45, bottom + 0.32), (2.45, c - 0.32), 'turned by\nposition', style='dashed')
        arrow(ax, (2.55, c + 0.32), (2.85, keys - 0.32), style='dashed')
    else:
        arrow(ax, (3, bottom + 0.32), (3, keys - 0.32), '$W_K$')
        arrow(ax, (5, bottom + 0.32), (5, keys - 0.32), '$W_V$')
    for x in (1, 3, 5):
        arrow(ax, (x, keys + 0.32), (x, top - 0.32))
    ax.set_title(title, fontsize=11)
    ax.set(xlim=(0, 6), ylim=(-0.1, 5.5))
    ax.axis('off')


def main():
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    column(left, 'MHA: every head reads its keys and values from $x$\n'
                 'cache: $k$ and $v$, 2 n_embd numbers per token and layer', latent=False)
    column(right, 'MLA: all heads read keys and values from one latent $c$. Dashed: with\n'
                  "rotary='decoupled' a rotary key $r$ of all heads. Cache: $c$ (and $r$)",
           latent=True)
    figure.suptitle('Orange with bold outline: what decoding has to remember of each token. At '
                    'n_latent = n_embd / 2, MLA remembers a quarter of what MHA does.', fontsize=11)
    figure.savefig(Path(__file__).parent / 'mla_diagram.png', dpi=120)


if __name__ == '__main__':
    main()
