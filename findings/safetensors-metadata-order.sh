#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata give other bytes from one save to the next, as soon as the
# metadata has two keys. The entries of `__metadata__` come in an order that is drawn anew; tensors, their order and
# the header's length stay. With one metadata key the bytes are always the same.
#
# Who keys a cache, a fingerprint or a "same bytes after resume" check by the SHA-256 of such a file finds changes
# where there are none. Hash the tensors and the parsed metadata, or keep all metadata under one key.
#
#   bash findings/safetensors-metadata-order.sh     # exits 0 while it is so, 1 when it has changed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
"$folder/env/bin/python" - <<'PY'
import hashlib
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

tensors = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(2, dtype=np.float32)}


def kinds(metadata):
    """Different files among 40 saves of the same content."""
    files = [save(tensors, metadata) for _ in range(40)]
    assert all(np.array_equal(load(file)["a"], tensors["a"]) for file in files)
    assert len({len(file) for file in files}) == 1
    return len({hashlib.sha256(file).hexdigest() for file in files})


one, two, four = (kinds({f"key{n}": "value" for n in range(count)}) for count in (1, 2, 4))
print(f"safetensors {safetensors.__version__}: different files among 40 saves of the same content:")
print(f"  1 metadata key: {one}; 2 keys: {two}; 4 keys: {four}")
sys.exit(0 if one == 1 and two == 2 and four > 2 else 1)
PY
