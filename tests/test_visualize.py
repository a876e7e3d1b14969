import json

from configurator import UserError

import numpy as np
import pytest
import torch
from analysis_models import random_model, same_function, subject
from conftest import CHARS
from PIL import Image
from sklearn.decomposition import PCA

import visualize_residual_space_gpt2 as visualize
from analysis.record import residual_streams
from model import GPT
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.figures import Figure
from runtime.tokenizer import make_tokenizer


def analysed(model, **settings):
    """The ResidualSpace of a model and the prompt abcdef."""
    config = visualize.ResidualConfig(**{'prompt': 'abcdef'} | settings)
    return visualize.analyse(subject(model), config)


def streams_of(model, text):
    ids = torch.tensor([[CHARS.index(char) for char in text]])
    return residual_streams(model, ids)[:, 0].double().numpy()


def same_up_to_sign(mine, theirs):
    """Whether the columns of two arrays (..., 2) are the same up to the sign of each."""
    for i in range(2):
        one, other = mine[..., i].ravel(), theirs[..., i].ravel()
        assert one * np.sign(one @ other) == pytest.approx(other, abs=1e-8)


@pytest.mark.parametrize('model_class', [GPT, GPT_MLA])
def test_shared_basis_agrees_with_scikit_learn(model_class):
    streams = streams_of(random_model(model_class), 'abcabcdefg')
    coordinates, explained = visualize.project(streams, 'shared')
    pca = PCA(2).fit(streams.reshape(-1, 16))
    assert explained == pytest.approx(np.tile(pca.explained_variance_ratio_, (3, 1)))
    same_up_to_sign(coordinates, pca.transform(streams.reshape(-1, 16)).reshape(3, 10, 2))


def test_a_basis_for_each_layer_agrees_with_scikit_learn():
    streams = streams_of(random_model(GPT), 'abcabcdefg')
    coordinates, explained = visualize.project(streams, 'per_layer')
    for X, mine, shares in zip(streams, coordinates, explained):
        pca = PCA(2).fit(X)
        assert shares == pytest.approx(pca.explained_variance_ratio_)
        same_up_to_sign(mine, pca.transform(X))
    for before, after in zip(coordinates, coordinates[1:]):
        assert ((before * after).sum(0) >= 0).all()


def test_too_few_samples_for_two_components():
    mean, components, explained = visualize.principal_components(np.array([[1.0, 2, 3]]))
    assert mean.tolist() == [1, 2, 3] and not components.any() and not explained.any()
    _, _, explained = visualize.principal_components(np.array([[1.0, 2, 3], [2, 3, 4]]))
    assert explained == pytest.approx([1, 0])


def test_subsets_are_seen_in_the_basis_of_all():
    model = random_model(GPT)
    whole = analysed(model, repeat=2)
    part = analysed(model, repeat=2, tokens='3:9', layers='embed,1')
    assert part.coordinates == pytest.approx(whole.coordinates[[0, 2]][:, 3:9])
    assert part.layers == ['embed', '1'] and part.tokens == list('defabc')
    assert part.copies == [0, 0, 0, 1, 1, 1] and part.places == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize('model_class', [GPT, GPT_MLA])
def test_the_same_function_gives_the_same_picture(model_class):
    model = random_model(model_class)
    one, two = analysed(model), analysed(same_function(model))
    assert one.explained == pytest.approx(two.explained, abs=1e-4)
    mine, theirs = one.coordinates, two.coordinates
    assert mine * np.sign((mine * theirs).sum((0, 1))) == pytest.approx(theirs, abs=1e-3)


def test_normalised_vectors_and_the_first_position():
    model = random_model(GPT)
    result = analysed(model, drop_first=True, normalize=True)
    streams = torch.from_numpy(streams_of(model, 'abcdef'))
    streams = torch.nn.functional.layer_norm(streams, (16,), eps=0).numpy() / 4
    expected, explained = visualize.project(streams[:, 1:], 'shared')
    assert result.tokens == list('bcdef')
    same_up_to_sign(result.coordinates, expected)
    assert result.explained == pytest.approx(explained)


def test_read_numbers():
    names = ['embed', '0', '1', '2', '3']
    for text, places in {'0:2': [1, 2], '2:': [3, 4], 'embed,3': [0, 4], '': [0, 1, 2, 3, 4],
                         '0,0': [1]}.items():
        assert visualize.read_numbers('layers', text, names) == places
    for wrong in ('7', '1:1', 'x', '1,,2', '1:2:3', '-1', '-3:'):
        with pytest.raises(UserError, match='layers='):
            visualize.read_numbers('layers', wrong, names)


def test_what_the_pictures_say():
    result = analysed(random_model(GPT), repeat=2, basis='per_layer', drop_first=True)
    grid = visualize.draw_grid('a/model', result)
    titles = [ax.get_title() for ax in grid.axes if ax.get_title()]
    names = ['embedding', 'after block 0', 'after block 1']
    assert titles == [f'{name}: {part:.0%} of its variance'
                      for name, part in zip(names, result.within)]
    assert result.within == pytest.approx(result.explained.sum(1))
    for ax, (share, _) in zip(grid.axes, result.explained):
        assert f"PC 1 ({share:.0%} of this layer's variance)" == ax.get_xlabel()
    assert 'first position left out' in grid.get_suptitle()
    assert 'a basis for each layer' in grid.get_suptitle()
    legend = grid.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ['copy 1', 'copy 2']
    result = analysed(random_model(GPT), repeat=2, drop_first=True)
    ax, centre, *_ = visualize.draw_trajectories('a/model', result).axes
    assert f'PC 1 ({result.explained[0, 0]:.0%} of all variance)' == ax.get_xlabel()
    assert ax.get_xlim()[0] <= centre.get_xlim()[0] < centre.get_xlim()[1] <= ax.get_xlim()[1]
    paths = [line.get_xydata() for line in ax.get_lines() if len(line.get_xydata()) == 3]
    assert np.stack(paths) == pytest.approx(result.coordinates.transpose(1, 0, 2))


def test_no_label_lies_on_another():
    result = analysed(random_model(GPT, block_size=64), prompt='abcdefghijklabcdefghijkl' * 2)
    figure = visualize.draw_trajectories('a/model', result)
    figure.draw_without_rendering()
    for ax in figure.axes[:2]:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) > 5
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    few = analysed(random_model(GPT), prompt='abc')
    points = few.coordinates[-1] * 100
    ax = Figure(figsize=(6, 6)).subplots()
    visualize.fit_axes(ax, points)
    visualize.write_labels(ax, points, few)
    assert [text.get_text() for text in ax.texts] == list('abc')


def test_the_share_of_each_layers_variance_that_is_shown():
    result = analysed(random_model(GPT), drop_first=True)
    streams = streams_of(random_model(GPT), 'abcdef')[:, 1:]
    streams = streams - streams.mean(-1, keepdims=True)
    for points, X, share in zip(result.coordinates, streams, result.within):
        def total(Y):
            return ((Y - Y.mean(0)) ** 2).sum()
        assert share == pytest.approx(total(points) / total(X), rel=1e-4)


def test_bases_that_differ_are_not_joined_and_a_paper_gets_its_pdf(program, tmp_path):
    path, out = tmp_path / 'ckpt.pt', tmp_path / 'space'
    save_checkpoint(path, random_model(GPT), make_tokenizer(CHARS), {}, 0)
    code, stdout, stderr = program(visualize.main, path, f'--out_dir={out}', '--prompt=abcd',
                                   '--basis=per_layer', '--format=pdf')
    assert code == 0, stderr
    assert sorted(p.name for p in out.iterdir()) == [
        'residual_space.json', 'residual_space.pdf', 'residual_space.png']
    assert (out / 'residual_space.pdf').read_bytes()[:4] == b'%PDF'
    assert 'residual_space.png, residual_space.pdf, residual_space.json' in stdout


def test_program(program, tmp_path):
    path, out = tmp_path / 'ckpt_mla.pt', tmp_path / 'space'
    save_checkpoint(path, random_model(GPT_MLA), make_tokenizer(CHARS), {}, 0)
    code, stdout, stderr = program(visualize.main, path, f'--out_dir={out}', '--random_tokens=5',
                                   '--repeat=2', '--animation', '--layers=0,1')
    assert code == 0, stderr
    numbers = json.loads((out / 'residual_space.json').read_text())
    assert np.shape(numbers['coordinates']) == (2, 10, 2) and numbers['copies'] == [0] * 5 + [1] * 5
    assert (out / 'residual_space.png').exists() and (out / 'residual_trajectories.png').exists()
    with Image.open(out / 'residual_space.gif') as gif:
        assert gif.n_frames == 9


@pytest.mark.parametrize('options, words', [
    (['--prompt=abc', '--repeat=9'], ['prompt', 'block_size=16']),
    (['--random_tokens=40'], ['random_tokens=40', 'block_size=16']),
    (['--random_tokens=1000000000000'], ['random_tokens=1000000000000', 'block_size=16']),
    (['--prompt=a'], ['too few']),
    (['--prompt=abc', '--layers=5'], ["layers='5'", 'embed']),
    (['--prompt=abc', '--tokens=0', '--drop_first'], ["tokens='0'"]),
    (['--prompt=XY'], ['prompt', "'X'"]),
    (['--prompt=FILE:none.txt'], ['none.txt']),
    (['--basis=both'], ['basis', 'per_layer']),
])
def test_a_mistake_is_one_line(options, words, program, tmp_path):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, random_model(GPT), make_tokenizer(CHARS), {}, 0)
    code, _, stderr = program(visualize.main, path, f'--out_dir={tmp_path / "a"}', *options)
    assert code == 2 and stderr.count('\n') == 1, stderr
    assert all(word in stderr for word in words), stderr
