"""
Where does the difference between two prompts lie: activations of one are put into the other.

    python -m analysis.patching gpt2 --clean="When Mary and John met, John spoke to" \
        --corrupted="When Mary and John met, Mary spoke to"
    python -m analysis.patching out/ckpt_mla.pt --clean="to be" --corrupted="to me" --receiver=2.1

It needs a model and two prompts of as many tokens. Without a clean one it takes how the val split
of the model's data begins; without a corrupted one, the clean one with the token at three quarters
of it replaced by another of its tokens.

The model runs on the corrupted prompt with one activation, at one position, as it is in the clean
prompt (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Heimersheim and Nanda
2024, "How to use and interpret activation patching", who call it denoising). How much of the logit
difference of the two answers comes back at the last position: 0 none, 1 all. A pattern is patched
at all positions together. Prompts whose differences are nearer than 0.2 nats have nothing to bring
back: their shares are unknown.

With a receiver, paths are patched (Wang et al. 2023, section 3.1): what an earlier head sends to
the receiver's queries, keys or values directly or through MLPs, and not through other heads. All
other heads write what they write in the corrupted prompt.
"""

from dataclasses import dataclass, field
from functools import partial

from configurator import UserError, run

import numpy as np
import torch

from analysis.notebook import OVER_PAIRS, both, own_name
from analysis.plots import Panel, draw_panels
from analysis.program import AnalysisConfig, main, read_heads
from analysis.record import Taps, final_stream, record, run_from
from analysis.subject import BATCH_TOKENS
from runtime.progress import progress_bar

COMPONENTS = {'resid_pre': 'residual stream before the block', 'attn_out': 'output of attention',
              'mlp_out': 'output of the MLP', 'attn.kv_latent': 'latent',
              'attn.z': 'output of a head', 'attn.pattern': 'pattern of a head, all positions'}
INPUTS = ('q', 'k', 'v')
LEAST_GAP = 0.2  # nats: shares of a smaller difference of one pair mean nothing


@dataclass
class Config(AnalysisConfig):
    clean: str = ''  # a text or FILE:prompt.txt; '': how the val split of the data begins
    corrupted: str = ''  # another of as many tokens; '': the clean one with a token replaced
    answer: str = ''  # the clean prompt's right token; '': the likeliest after it
    against: str = ''  # the corrupted prompt's; '': the likeliest after it that is not the answer
    components: str = ''  # which, such as attn.z,mlp_out, or any name of docs/notebook.md; '':
        # resid_pre, attn_out, mlp_out, attn.kv_latent, attn.z and attn.pattern
    receiver: str = ''  # a head such as 2.1, into which paths are patched; '': none
    top: int = 8  # places in the table
    least = dict(top=1)


@dataclass
class Patching:
    clean_tokens: list  # texts
    corrupted_tokens: list
    answer: str
    against: str
    clean: float  # logit of answer less that of against after the clean prompt, nats
    corrupted: float  # after the corrupted one
    restored: dict  # component -> share restored: (n_layer, T), (heads, T), or (n_layer, n_head)
    receiver: str = ''
    paths: dict = field(default_factory=dict)  # 'q', 'k', 'v' -> (n_layer, n_head) share restored
    left_out: list = field(default_factory=list)  # components that the model has not
    n_layer: int = 0
    top: int = 8


class Pair:
    """Two prompts of one length, and the difference of two logits after them."""

    def __init__(self, subject, clean, corrupted, answer, against):
        """clean and corrupted are ids (1, T), answer and against ids."""
        self.subject, self.model = subject, subject.model
        self.clean, self.corrupted = subject.run(clean), subject.run(corrupted)
        self.answer, self.against = answer, against
        blocks = list(record(self.model, self.corrupted.idx))
        self.entering = [block.before for block in blocks]
        self.after = self.difference(blocks[-1].after).item()
        self.before = self.difference(final_stream(record(self.model, self.clean.idx))).item()

    @torch.no_grad()
    def difference(self, x):
        """Of the logits after the last position of the last residual stream x (B, T, n_embd)."""
        logits = self.model.unembed(x[:, -1])
        return (logits[:, self.answer] - logits[:, self.against]).double().cpu()

    def share(self, differences):
        """How much of the way from corrupted to clean; nan where that is next to nothing."""
        gap = self.before - self.after
        return (np.asarray(differences) - self.after) / gap if abs(gap) >= LEAST_GAP else np.full(
            np.shape(differences), np.nan)

    def run(self, layer, edits, copies):
        """The differences (copies,) of as many corrupted prompts from a layer on."""
        x = self.entering[layer].expand(copies, -1, -1)
        return self.difference(final_stream(run_from(self.model, x, layer, Taps(edits))))


def patch(pair, component):
    """How much of a component restores at each place: (n_layer, T) of one that is whole in a
    layer, (n_layer * n_head, T) of one that heads have, (n_layer, n_head) of their patterns."""
    n_layer, T = pair.model.config.n_layer, pair.clean.idx.size(1)
    found, by_pattern = [], is_by_head(component)
    for layer in progress_bar(range(n_layer), f'patching {component}'):
        name = f'blocks.{layer}.{component}'
        theirs = pair.clean[name]
        heads = range(theirs.size(1)) if theirs.dim() == 4 else [slice(None)]
        columns = [slice(None)] if by_pattern else range(T)
        places = [(head, t) for head in heads for t in columns]
        size = max(1, BATCH_TOKENS // T)
        shares = [pair.run(layer, {name: patch_each(places[i:i + size], theirs)},
                           len(places[i:i + size])) for i in range(0, len(places), size)]
        found.append(torch.cat(shares).view(len(heads), len(columns)))
    shares = pair.share(torch.stack(found).numpy())  # (n_layer, heads or 1, T or 1)
    return shares[..., 0] if by_pattern else shares.reshape(-1, T)


def patch_each(places, theirs):
    """An edit in which sequence i of an activation has theirs (1, ..., T, n) at places[i], a head
    and a position."""
    def edit(value):
        value = value.clone()
        for row, (head, t) in enumerate(places):
            part = (head, t) if value.dim() == 4 else (t,)
            value[(row, *part)] = theirs[(0, *part)]
        return value
    return edit


def patch_paths(pair, receiver, read):
    """How much each earlier head restores through what it sends to read, 'q', 'k' or 'v', of the
    receiver (layer, head): (n_layer, n_head); nan behind it."""
    c, (last, head) = pair.model.config, receiver
    name = f'blocks.{last}.attn.{read}'
    own = pair.corrupted.read([f'blocks.{layer}.attn.z' for layer in range(last)])
    n_own = pair.corrupted[name].size(1)
    head = head * n_own // c.n_head  # heads of a group share keys and values
    found = np.full((c.n_layer, c.n_head), np.nan)
    for layer in progress_bar(range(last), f'paths into {read}'):
        key = f'blocks.{layer}.attn.z'
        # sequence i has the clean output of head i; all later heads are held
        frozen = {z: hold(value) for z, value in own.items()}
        senders = [(i, slice(None)) for i in range(c.n_head)]
        frozen[key] = partial(both, hold(own[key]), patch_each(senders, pair.clean[key]))
        taps = Taps(frozen, frozenset([name]))
        x = pair.entering[layer].expand(c.n_head, -1, -1)
        for _ in run_from(pair.model, x, layer, taps):
            if taps.found:
                break
        sent = taps.found[name][:, head]

        def receive(value, sent=sent):
            value = value.clone()
            value[:, head] = sent
            return value
        found[layer] = pair.share(pair.run(last, {name: receive}, c.n_head).numpy())
    return found


def hold(value):
    """An edit that holds all sequences at value (1, ...)."""
    return lambda now: value.expand_as(now)


def replace_one(ids, seed):
    """ids with the one at three quarters replaced by another one of them. Raises UserError where
    all are the same."""
    place = 3 * len(ids) // 4
    others = sorted({*ids} - {ids[place]})
    if not others:
        raise UserError('clean has one kind of token: give a corrupted prompt')
    return [*ids[:place], int(np.random.default_rng(seed).choice(others)), *ids[place + 1:]]


def read_pair(subject, config):
    """The Pair that a Config asks for. Raises UserError."""
    clean = subject.prompt(config.clean, 'clean', most=16)
    corrupted = (subject.prompt(config.corrupted, 'corrupted') if config.corrupted
                 else replace_one(clean, config.seed))
    if len(clean) != len(corrupted):
        raise UserError(f'clean has {len(clean)} tokens and corrupted {len(corrupted)}: give two '
                        'prompts of as many')
    if clean == corrupted:
        raise UserError('clean and corrupted are the same tokens: give two that differ')
    ends = []
    for key, given, ids in (('answer', config.answer, clean),
                            ('against', config.against, corrupted)):
        likeliest = subject.run(ids).logits[0, -1, :subject.n_vocab].topk(2).indices.tolist()
        chosen = subject.one_token(key, given) if given else next(
            token for token in likeliest if token not in ends)
        ends.append(chosen)
    if ends[0] == ends[1]:
        raise UserError('answer and against are the same token: give two that differ')
    return Pair(subject, clean, corrupted, *ends)


def components_of(subject, text):
    """The components that a text names, and those of the usual ones that the model has not. Raises
    UserError."""
    known = {name.split('.', 2)[2] for name in subject.names if name.startswith('blocks.')}
    asked = [own_name(f'.{part.strip()}')[1:] for part in text.split(',') if part.strip()]
    for name in asked:
        if name not in known:
            raise UserError(f'components={name!r} is not in this model: it has '
                            + ', '.join(sorted(known)))
    usual = [name for name in COMPONENTS if name in known]
    return asked or usual, [] if asked else [name for name in COMPONENTS if name not in known]


def analyse(subject, config):
    c = subject.model.config
    components, left_out = components_of(subject, config.components)
    receiver = read_heads('receiver', config.receiver, c)[0] if config.receiver else None
    if receiver and receiver[0] == 0:
        raise UserError(f'receiver={config.receiver} is in the first layer, to which no head sends '
                        'anything: name a later one')
    pair = read_pair(subject, config)
    restored = {name: patch(pair, name) for name in components}
    paths = {read: patch_paths(pair, receiver, read) for read in INPUTS} if receiver else {}
    label = pair.clean.label
    return Patching(pair.clean.labels(), pair.corrupted.labels(), label(pair.answer),
                    label(pair.against), pair.before, pair.after, restored, config.receiver, paths,
                    left_out, c.n_layer, config.top)


def is_by_head(component):
    """Whether the map of a component is (n_layer, n_head), and has no positions."""
    return component.endswith(OVER_PAIRS)


def row_names(component, shares, n_layer):
    """The names of the rows of a map: layers, or heads as layer.head."""
    each = len(shares) // n_layer
    return [str(row) if each == 1 else f'{row // each}.{row % each}' for row in range(len(shares))]


def strongest(result, component, shares):
    """The places of a map that restore most, as text."""
    names = row_names(component, shares, result.n_layer)
    found = []
    order = np.argsort(-abs(np.nan_to_num(shares)), axis=None, kind='stable')[:result.top]
    for i, j in zip(*np.unravel_index(order, shares.shape)):
        where = f'{i}.{j}' if is_by_head(component) else (
            f'{names[i]} at {j} {result.clean_tokens[j]}')
        found.append(f'{where:<14}{shares[i, j]:>+6.0%}')
    return ['   '.join(found[i:i + 4]) for i in range(0, len(found), 4)]


def table(result):
    lines = [f'logit of {result.answer} less {result.against}: {result.clean:+.2f} nats after the '
             f'clean prompt, {result.corrupted:+.2f} after the corrupted one']
    changed = [f'{t}: {one} -> {other}' for t, (one, other)
               in enumerate(zip(result.clean_tokens, result.corrupted_tokens)) if one != other]
    lines.append(f'tokens that differ: {", ".join(changed)}')
    if result.left_out:
        lines.append(f'left out, since this model has none: {", ".join(result.left_out)}')
    if abs(result.clean - result.corrupted) < LEAST_GAP:
        return '\n'.join([*lines, 'the two differ too little to restore anything: give prompts '
                                  'that end otherwise, or other answers'])
    for component, shares in result.restored.items():
        lines += ['', f'{component}, share restored', *strongest(result, component, shares)]
    for read, shares in result.paths.items():
        lines += ['', f'paths into {read} of {result.receiver}, share restored',
                  *strongest(result, 'pattern', shares)]
    return '\n'.join(lines)


def plot(results):
    panels, end = [], 1  # the same scale for all models: what is beyond it has its last colour
    # a component that only some of the models have is drawn for those
    components = dict.fromkeys(name for result in results.values() for name in result.restored)
    for component in components:
        served = {name: result for name, result in results.items() if component in result.restored}
        maps = {name: result.restored[component] for name, result in served.items()}
        title = COMPONENTS.get(component, component)
        if is_by_head(component):
            panels.append(Panel(title, maps, 'share restored', -end, end, 'RdBu_r'))
            continue
        names = {name: (row_names(component, maps[name], result.n_layer),
                        [f'{t} {text}' for t, text in enumerate(result.clean_tokens)])
                 for name, result in served.items()}
        by_layer = all(len(maps[name]) == result.n_layer for name, result in served.items())
        panels.append(Panel(title, maps, 'share restored', -end, end, 'RdBu_r',
                            'layer' if by_layer else 'head', 'position', numbers=False,
                            names=names))
    for read in INPUTS:
        maps = {name: result.paths[read] for name, result in results.items() if result.paths}
        if maps:
            panels.append(Panel(f'paths from a head into {read} of a receiver', maps,
                                'share restored', -end, end, 'RdBu_r'))
    title = '\n'.join(f'{name}: {result.answer} less {result.against}, {result.corrupted:+.2f} to '
                      f'{result.clean:+.2f} nats' for name, result in results.items())
    return draw_panels(f'Activation patching: corrupted to clean. Colours end at -1 and 1\n{title}',
                       panels)


if __name__ == '__main__':
    run(lambda: main('patching', Config, analyse, table, plot))
