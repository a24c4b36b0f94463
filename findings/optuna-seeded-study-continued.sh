#!/usr/bin/env bash
# Optuna 5.0.0: a study that is continued with a seeded sampler proposes its first points again. The trials are in the
# storage, and the sampler sees them; but a sampler made anew with the same seed starts its random numbers anew, and
# while it still draws at random (TPE's first 10 trials by default) the stored trials play no part in what it draws.
# A search that is stopped after 4 trials and continued for 4 more has tried 4 points twice, and says nothing.
#
# Who wants both, a seed and a search that can be continued, mixes the number of stored trials into the seed.
#
#   bash findings/optuna-seeded-study-continued.sh     # exits 0 while it is so, 1 when it has changed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
"$folder/env/bin/python" - "$folder" <<'PY'
import sys

import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
storage = f"sqlite:///{sys.argv[1]}/study.db"


def search(trials):
    """Run so many trials in a study that is made or continued, as a new process would."""
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=trials)
    return [trial.params["x"] for trial in study.trials]


search(4)
points = search(4)
print(f"optuna {optuna.__version__}, TPESampler(seed=0), 4 trials, then the study continued for 4 more:")
print("  first ", [round(x, 4) for x in points[:4]])
print("  second", [round(x, 4) for x in points[4:]])
print(f"  different points among 8: {len(set(points))}")
sys.exit(0 if points[:4] == points[4:] else 1)
PY
