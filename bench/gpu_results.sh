#!/usr/bin/env bash
# Run the papers' rows of CIFAR-10 in full, by their recipes, and write what they reach, one line of JSON for each run:
#
#     bench/gpu_results.sh CIFAR10_FOLDER [RUNS]
#
# First the unpruned networks are trained (200 epochs), then each recipe searches with its whole schedule, fine-tunes (160
# epochs, or as its recipe says) and is measured on the whole test set. RUNS, by default runs/cifar10, holds the runs.
# A second call goes on where the first one stopped: finished rows are left out, others resume from their checkpoints.
# Needs fastprune installed and a GPU. Exits with the number of rows that failed; the others go on.
#
#     SEEDS="0 1 2"           seeds of search and fine-tuning, one run each; by default 0
#     ROWS="dmc-resnet56-…"   recipes; by default all for CIFAR-10
#     BASE_resnet56=FILE      trained weights in place of the training, for resnet56 or mobilenetv2
#     DEVICE=cuda:1           by default cuda
#     RESULTS=FILE            by default bench/results/cifar10-DEVICE.jsonl
#     SMOKE=1                 a try-out: one epoch of everything on the CPU on small made images, results in RUNS
set -uo pipefail

cd "$(dirname "$0")/.."
smoke=${SMOKE:-}
if [[ -n $smoke ]]; then
    data=synthetic:3x8x8:10:256 runs=${1:?usage: SMOKE=1 bench/gpu_results.sh RUNS} device=cpu
    results=${RESULTS:-$runs/results.jsonl}
else
    folder=$(realpath -e "${1:?usage: bench/gpu_results.sh CIFAR10_FOLDER [RUNS]}") || exit 2
    data=cifar10:$folder runs=${2:-runs/cifar10} device=${DEVICE:-cuda}
    name=$(python -c "import torch; print(torch.cuda.get_device_name('$device').replace(' ', '-'))") || exit 2
    results=${RESULTS:-bench/results/cifar10-$name.jsonl}
fi
mkdir -p "$runs" "$(dirname "$results")"
touch "$results"

# Epochs, batches and populations of a try-out, by method; empty for the real thing.
declare -A small=()
short=()
if [[ -n $smoke ]]; then
    for method in dmc ddnp; do small[$method]="--$method.epochs 1 --$method.samples 64 --$method.batch_size 32"; done
    small[sanp]="--sanp.epochs 1 --sanp.batch_size 64"
    small[soft]="--soft.epochs 1 --soft.batch_size 64"
    small[hrank]="--hrank.images 16"
    small[sp]="--sp.epochs 1 --sp.batch_size 64 --sp.images 10 --sp.population 10 --sp.iterations 1 --sp.parents 2"
    small[sp]+=" --sp.levels 4"
    short=(--epochs 1 --batch_size 64)
fi

is_done() { # is_done RECIPE SEED: whether the results have this row
    python - "$results" "$@" <<'PY'
import json, sys
path, recipe, seed = sys.argv[1:]
lines = [json.loads(line) for line in open(path, encoding="utf-8") if line.strip()]
sys.exit(not any((line["recipe"], line["seed"]) == (recipe, int(seed)) for line in lines))
PY
}

note() { # note RECIPE SEED RUN: measure the run's networks once more, from its files alone, and add a line
    local measured
    measured=$(fastprune evaluate --run "$3" --device "$device" --json) || return
    python bench/gpu_row.py "$results" "$@" "$measured" "$device"
}

train() { # train RECIPE SEED: train an unpruned network
    local run=$runs/$1-$2
    if [[ -f $run/config.yaml ]]; then
        fastprune train --resume --out "$run" --device "$device" || return
    else
        fastprune train --recipe "$1" --data "$data" --seed "$2" --device "$device" --out "$run" "${short[@]}" || return
    fi
    note "$1" "$2" "$run"
}

base() { # base NETWORK: train the network that is pruned, unless its weights are given; sets $weights
    local given=BASE_$1 recipe=train-$1-cifar10
    weights=${!given:-$runs/$recipe-0/model.safetensors}
    [[ -n ${!given:-} ]] || is_done "$recipe" 0 || train "$recipe" 0
}

row() { # row RECIPE SEED: search, fine-tune, measure
    local recipe=$1 seed=$2 run=$runs/$1-$2 method=${1%%-*} network
    if [[ $method == train ]]; then
        train "$recipe" "$seed"
        return
    fi
    network=${recipe#*-} network=${network%%-*}
    base "$network" || return
    if [[ -f $run/finetune.yaml ]]; then # the search has ended
        fastprune finetune --resume --run "$run" --device "$device" || return
        note "$recipe" "$seed" "$run"
        return
    elif [[ -f $run/config.yaml ]]; then
        fastprune prune --resume --out "$run" --device "$device" || return
    else
        # shellcheck disable=SC2086  # several words
        fastprune prune --recipe "$recipe" --data "$data" --weights "$weights" --seed "$seed" --device "$device" \
            --out "$run" ${small[$method]:-} || return
    fi
    if grep -q '^finetune:' "$run/config.yaml"; then
        fastprune finetune --run "$run" --seed "$seed" --device "$device" "${short[@]}" || return
    fi
    note "$recipe" "$seed" "$run"
}

rows=${ROWS:-$(python -c "
import subprocess, json
names = json.loads(subprocess.check_output(['fastprune', 'recipes', 'ls', '--json']))
print(*(name for name in names if '-cifar10' in name))")} || exit 2
failed=0
for seed in ${SEEDS:-0}; do
    for recipe in $rows; do
        if is_done "$recipe" "$seed"; then
            echo "=== $recipe, seed $seed: done before"
            continue
        fi
        echo "=== $recipe, seed $seed"
        start=$SECONDS
        if row "$recipe" "$seed"; then
            echo "=== $recipe, seed $seed: ok, $((SECONDS - start)) s"
        else
            echo "=== $recipe, seed $seed: FAILED, $((SECONDS - start)) s"
            failed=$((failed + 1))
        fi
    done
done
echo "$(wc -l <"$results") lines in $results; $failed rows failed"
exit $((failed > 99 ? 99 : failed))
