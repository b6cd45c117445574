#!/usr/bin/env bash
# Everything that a GPU machine must tell, in under 9 minutes (SECONDS_IN_ALL: in so many seconds,
# of which the tests may take TEST_SECONDS).
# It needs a checkout, torch, Triton and, for the CUDA op, nvcc; neither vLLM nor a network.
#
#     bash benchmarks/gpu/run.sh [OUT]     build, test, measure; results in the folder OUT
#     bash benchmarks/gpu/run.sh --rehearse [OUT]    the same path on a CPU, tiny and unbuilt
#
# Where pytest is missing, fetch it before, on a machine with a network, and take it along:
#
#     python -m pip download -d .gpu/wheels --only-binary :all: --python-version 3.12 \
#         pytest hypothesis
#
# The exit status is 1 if a build, a test or a measurement failed; what follows still runs.
set -uo pipefail
cd "$(dirname "$0")/../.."

rehearse=
if [[ ${1:-} == --rehearse ]]; then rehearse=1; shift; fi
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/{build,tests,sanitizer,pinned,ops}.log "$out"/{pinned,ops}.jsonl

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=0
step() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }
fail() { failed=1; printf '!! %s\n' "$*"; }

step "environment"
$python - <<'PYTHON' || { fail "torch or Triton is missing"; exit 1; }
import sys, torch, triton
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")
PYTHON
if [[ -z $rehearse ]]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
        { fail "there is no GPU; use --rehearse"; exit 1; }
fi
if ! $python -c 'import pytest, hypothesis' 2>/dev/null; then
    for wheel in .gpu/wheels/*.whl; do
        [[ -f $wheel ]] || { fail "pytest is missing: see the top of this script"; exit 1; }
        # What the machine has, it keeps: only what is missing is unpacked.
        name=$(basename "$wheel"); name=${name%%-*}
        $python -c "import $name" 2>/dev/null ||
            $python -m zipfile -e "$wheel" "$out/.wheels"
    done
    export PYTHONPATH="$PYTHONPATH:$out/.wheels"
fi

if [[ -z $rehearse ]]; then
    step "build: build.log"
    archs=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    TAILORKV_CUDA=1 TAILORKV_CUDA_ARCHS=${TAILORKV_CUDA_ARCHS:-$archs} MAX_JOBS=$(nproc) \
        timeout 150 $python setup.py build_ext --inplace >"$out/build.log" 2>&1 ||
        { fail "the build failed:"; tail -5 "$out/build.log"; }
    $python -c 'import sys; from vllm_tailorkv.kernels import cuda; sys.exit(cuda.unavailable())' ||
        fail "the CUDA op cannot run"
fi

step "tests: tests.log"
if [[ -n $rehearse ]]; then
    $python -m pytest -q -p no:cacheprovider --collect-only tests/kernels -k triton-interpreted \
        >"$out/tests.log" 2>&1 || fail "the tests cannot be collected"
    grep collected "$out/tests.log"
else
    # Most of the time goes into compiling kernels and into the reference, on the CPU: a process for
    # each core, where pytest has them.
    workers=()
    $python -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
    limit=${TEST_SECONDS:-200}
    OMP_NUM_THREADS=1 timeout "$limit" $python -m pytest -vv --tb=short -p no:cacheprovider \
        "${workers[@]}" tests/kernels -k 'device or pinned' >"$out/tests.log" 2>&1
    status=$?
    [[ $status == 0 ]] || fail "the tests ended with $status (124: not finished after $limit s)"
    for outcome in PASSED FAILED SKIPPED; do
        printf '   %d %s\n' "$(grep -c "$outcome " "$out/tests.log")" "${outcome,,}"
    done
    grep -E '^(FAILED|ERROR) ' "$out/tests.log" | cut -c -200 | head -20
fi

if [[ -z $rehearse ]]; then
    if command -v compute-sanitizer >/dev/null; then
        step "compute-sanitizer: sanitizer.log"
        timeout 90 compute-sanitizer --error-exitcode 9 $python -m pytest -q -x \
            -p no:cacheprovider tests/kernels/test_cuda_ops.py \
            -k 'device and not random' >"$out/sanitizer.log" 2>&1
        status=$?
        case $status in
            0) ;;
            124) echo "   stopped after 90 s, with no error so far" ;;
            *) fail "compute-sanitizer ended with $status" ;;
        esac
        tail -2 "$out/sanitizer.log"
    else
        echo "   compute-sanitizer is not here"
    fi
fi

step "pinned memory: pinned.jsonl, pinned.log"
options=()
[[ -n $rehearse ]] && options=(--device cpu --gib 0.01)
timeout 90 $python benchmarks/gpu/pinned.py --json "$out/pinned.jsonl" "${options[@]}" \
    >"$out/pinned.log" 2>&1 || { fail "pinning failed:"; tail -5 "$out/pinned.log"; }

step "measurements: ops.jsonl, ops.log"
left=$((${SECONDS_IN_ALL:-510} - SECONDS))
if [[ -n $rehearse ]]; then
    options=(--device cpu --tiny)
    export TRITON_INTERPRET=1
else
    options=(--seconds $((left - 60)))
fi
timeout $((left > 60 ? left : 60)) $python benchmarks/gpu/ops.py --json "$out/ops.jsonl" \
    "${options[@]}" >"$out/ops.log" 2>&1 || { fail "the measurements failed:"; tail -5 "$out/ops.log"; }
sed -n '/^op  /,$p' "$out/ops.log"
rm -rf "$out/.wheels"
step "done: $out"
exit $failed
