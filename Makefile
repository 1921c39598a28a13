PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Small networks gain nothing from more threads.
export OMP_NUM_THREADS ?= 2
# Tests run file by file in so many processes, each of one thread: most of them wait for one process that they start.
TEST_PROCESSES ?= 2

.PHONY: install demo test lint docs ablation clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: install
	$(BIN)/cocosctl translate -m demo --weights demo --raw -o demo-out --report demo-out/index.html
	@echo "The pictures are named above; demo-out/index.html shows them side by side."

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check cocosctl cocosnet tests

docs: install
	$(BIN)/python docs/make_cli.py > docs/cli.md

# The paper's Tables 4 and 5, three seeds; run again to go on where it was stopped. For other photographs and features:
# make ablation ABLATION='photos/ --features vgg16'
ABLATION ?=
ablation: install
	$(BIN)/cocosctl bench ablation $(ABLATION) -o ablation-out

clean:
	rm -rf demo-out build dist *.egg-info .pytest_cache .ruff_cache
