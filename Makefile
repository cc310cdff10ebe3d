PYTHON ?= python3
TORCH ?= torch==2.13.0
UCX ?= ucx

BIN := .venv/bin
HOUSE := ucxgossip kernels bench
SIZES := 8,65536,4194304
PEERS := gloo_allreduce,gloo_gossip,mpi_allreduce,mpi_gossip,sockets,copy,fixed
METHODS := local,allreduce,gossip-weights-atc,gossip-both-atc

.PHONY: help demo test bench soak errors typed clean

help:
	@echo 'make demo    make .venv when absent, then run examples/demo.py'
	@echo 'make test    make .venv when absent, then ruff, mypy --strict and pytest'
	@echo 'make bench   make .venv when absent, then the benchmarks; rows go to out/*.json'
	@echo 'make soak    make .venv when absent, then long runs that try to break it; about an hour'
	@echo 'make errors  write docs/errors.md: what is said to each bad input'
	@echo 'make clean   remove .venv, caches and everything built'
	@echo
	@echo 'TORCH=$(TORCH)  what pip installs for torch    UCX=$(UCX)  ucx: the UCX wheel; cu12, cu13: and CUDA'
	@echo 'Run make clean before changing either.'

demo: .venv/ready build/compiled
	$(BIN)/python examples/demo.py

test: .venv/ready build/compiled typed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict -p ucxgossip
	$(BIN)/pytest -n 2 --dist loadfile -m 'not spawn'
	$(BIN)/pytest -m spawn

bench: .venv/ready build/compiled
	mkdir -p out
	$(BIN)/ucxgossip doctor --json out/doctor.json
	$(BIN)/ucxgossip bench put --transport tcp --sizes $(SIZES) --against ucx_perftest --json out/put-tcp.json
	$(BIN)/ucxgossip bench put --transport shm --sizes $(SIZES) --against ucx_perftest --json out/put-shm.json
	$(BIN)/ucxgossip bench exchange --transport tcp --ranks 2,4 --sizes $(SIZES) --against $(PEERS) --json out/exchange-tcp.json
	$(BIN)/ucxgossip bench exchange --transport shm --ranks 2,4 --sizes $(SIZES) --against $(PEERS) --json out/exchange-shm.json
	$(BIN)/ucxgossip bench kernels --json out/kernels.json
	$(BIN)/ucxgossip bench step --transport shm --cores 1 --json out/step-shm.json
	$(BIN)/ucxgossip bench step --transport tcp --cores 1 --json out/step-tcp.json
	$(BIN)/ucxgossip bench idle --json out/idle.json
	$(BIN)/ucxgossip bench startup --json out/startup.json
	-$(BIN)/ucxgossip bench flat --json out/flat.json # needs root and iproute2
	$(BIN)/ucxgossip bench train --model lenet --ranks 4 --methods $(METHODS) --seeds 2 --json out/train.json

soak: .venv/ready build/compiled
	mkdir -p out
	$(BIN)/python -m ucxgossip.bench.soak chunks --chunks 10000000 --json out/soak-chunks.json
	$(BIN)/python -m ucxgossip.bench.soak chunks --chunks 1000000 --way processes --json out/soak-processes.json
	$(BIN)/python -m ucxgossip.bench.soak chunks --chunks 300000 --way stops --json out/soak-stops.json
	$(BIN)/python -m ucxgossip.bench.soak exchanges --exchanges 1000000 --json out/soak-exchanges.json
	$(BIN)/python -m ucxgossip.bench.fuzz --inputs 1000000 --json out/fuzz.json
	$(BIN)/python -m ucxgossip.bench.kills --transport tcp,shm --ranks 8 --kills 100 --json out/soak-kills.json
	$(BIN)/python -m ucxgossip.bench.rejoins --transport tcp,shm --ranks 4 --cycles 20 --json out/soak-rejoins.json

errors: .venv/ready build/compiled
	$(BIN)/python tests/bad_inputs.py

# torch comes first, and by itself: the package's own requirement would admit any build of it.
.venv/ready: setup.cfg
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[$(UCX),demo,test]'
	touch $@

# numba's cache notices a change in a function's own file, not in the functions it calls.
build/compiled: $(shell find $(HOUSE) -name '*.py')
	find $(HOUSE) -name '*.nb[ic]' -delete
	mkdir -p build
	touch $@

typed:
	rm -rf build/typed
	mkdir -p build/typed/ucxgossip
	ln -s '$(CURDIR)'/ucxgossip/* '$(CURDIR)/kernels' '$(CURDIR)/bench' build/typed/ucxgossip/

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(HOUSE) examples tests -name __pycache__ -prune -exec rm -rf {} +
