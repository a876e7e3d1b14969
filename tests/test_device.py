"""What a program does with a Mac's GPU, which no machine of the tests has: a stand-in says that it
is there."""

import pytest
import torch
from conftest import tiny_model

import convert_mla
from analysis import program as analysis_program
from analysis import spectrum
from model import GPT
from runtime.checkpoint import save_checkpoint
from runtime.device import peak_flops, peak_of_card, pick_device, pick_float64_device
from runtime.tokenizer import make_tokenizer

NOTE = 'note: device=mps has no float64: this runs on the CPU\n'


@pytest.fixture(autouse=True)
def on_a_mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


@pytest.mark.parametrize('name', ['auto', 'mps'])
def test_what_computes_in_float64_moves_to_the_cpu(name, capsys):
    assert pick_device(name) == (torch.device('mps'), 'mps') and capsys.readouterr().err == ''
    assert pick_float64_device(name) == torch.device('cpu') and capsys.readouterr().err == NOTE


def test_other_devices_stay(capsys):
    assert pick_float64_device('cpu') == torch.device('cpu') and capsys.readouterr().err == ''


@pytest.mark.parametrize('device', [[], ['--device=mps']])
def test_analyses_and_the_converter_run(device, tmp_path, program):
    save_checkpoint(tmp_path / 'ckpt.pt', tiny_model(GPT), make_tokenizer(list('\n abcdefghijkl')),
                    {}, 0)
    code, _, err = program(lambda: analysis_program.main(
        'spectrum', spectrum.Config, spectrum.analyse, spectrum.table, spectrum.plot),
        tmp_path, f'--out_dir={tmp_path / "a"}', *device)
    assert code == 0 and err.startswith(NOTE), err
    code, _, err = program(convert_mla.main, tmp_path, f'--out_dir={tmp_path / "m"}', *device)
    assert code == 0 and err.startswith(NOTE), err


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A100 80GB PCIe', 312e12),
    ('NVIDIA RTX A1000', None),
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12),
    ('NVIDIA H200 NVL', 835e12), ('NVIDIA GB200', 2500e12), ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12), ('NVIDIA L40', 181e12), ('NVIDIA A10', 125e12), ('NVIDIA A10G', None),
    ('NVIDIA GeForce RTX 4090', 165e12), ('NVIDIA GeForce RTX 4090 D', None),
    ('NVIDIA GeForce RTX 3090 Ti', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None)])
def test_the_peak_is_that_of_the_card_and_of_no_other(name, peak):
    assert peak_of_card(name) == peak


def test_the_peak_is_known_for_16_bit_alone():
    assert peak_flops(torch.device('cuda'), torch.float32) is None
    assert peak_flops(torch.device('cpu'), torch.bfloat16) is None
