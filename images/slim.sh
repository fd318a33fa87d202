#!/bin/sh
# Takes out of a virtual environment what a server never reads, and compiles the rest: slim.sh VENV. KEEP_HEADERS, if not
# empty, leaves what extensions are compiled against.
set -eu
venv=$1
site=$venv/lib/python3.11/site-packages
cd "$site"

# Only where nothing else imports them: torch.testing and numpy.testing stay.
rm -rf torch/test torch/lib/libtorchbind_test.so numba/tests
[ -n "${KEEP_HEADERS:-}" ] || rm -rf torch/include torch/share
find torch/bin -type f ! -name torch_shm_manager -delete
for package in networkx numpy scipy sympy; do
  [ ! -d "$package" ] || find "$package" -type d -name tests -prune -exec rm -rf {} +
done
find . -name '*.a' -delete

# vLLM's own libraries come with symbols; those of torch are left as their wheel has them.
find vllm -name '*.so' -exec strip --strip-unneeded {} +

# Some packages carry files that are no Python 3.11, templates above all: those stay without.
"$venv/bin/python" -m compileall -q --invalidation-mode unchecked-hash . >/dev/null || true
