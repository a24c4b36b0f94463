#!/usr/bin/env bash
# transformers 5.23 writes a Llama config that transformers 4.57 opens without a word and with another rotary base. 5.x
# writes the base inside `rope_parameters` and no `rope_theta`; 4.57 reads `rope_theta` alone, finds none, and takes
# its default of 10,000, keeping `rope_parameters` as an attribute that its model never asks. So a checkpoint saved
# with 5.x and served by a tool that bundles 4.x answers with wrong positions: no error, no warning.
#
# Who writes checkpoints for others writes the old key beside the new one.
#
#   bash findings/transformers-5-config-in-4.57.sh     # exits 0 while it is so, 1 when it has changed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
export HF_HUB_OFFLINE=1
"$folder/5.23.0/bin/python" - "$folder/saved" <<'PY'
import json
import sys
import warnings

warnings.simplefilter("ignore")
import transformers
from transformers import LlamaConfig

base = {"rope_type": "default", "rope_theta": 100000.0}
LlamaConfig(rope_parameters=base, hidden_size=64, num_attention_heads=4).save_pretrained(sys.argv[1])
written = json.load(open(f"{sys.argv[1]}/config.json"))
print(f"transformers {transformers.__version__} writes: rope_parameters={written.get('rope_parameters')}, "
      f"rope_theta={written.get('rope_theta', 'absent')}")
PY
"$folder/4.57.1/bin/python" -W error::UserWarning - "$folder/saved" <<'PY'
import sys

import transformers
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__} reads: rope_theta={config.rope_theta}")
sys.exit(0 if config.rope_theta == 10000.0 else 1)
PY
