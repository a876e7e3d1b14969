"""Sample from a GPT_MLA: sample.py that looks for ckpt_mla.pt in out_dir. python sample_mla.py --out_dir=out_mla"""

from configurator import run
from sample import main

if __name__ == '__main__':
    run(lambda: main('mla', out_dir='out_mla'))
