#!/usr/bin/env bash
# Packs what a GPU machine without a network needs to serve with the real vLLM: a stripped vLLM
# 0.32.0, the wheels that such a machine lacks beside torch, Triton and transformers
# (carry_wheels.txt), and metadata by which vLLM finds the plugin of a checkout. It needs a network.
#
#     bash benchmarks/gpu/carry.sh                    write .gpu/site, under 50 MiB
#     bash benchmarks/gpu/carry.sh --metadata FOLDER  only the metadata, without a network
#
# On the GPU machine, in the checkout:
#
#     bash .gpu/site/unpack.sh     fills /tmp/site
#     PYTHONPATH=/tmp/site:. python3 benchmarks/gpu/serve.py pool eager --out OUT
#
# GPU_ARCH is that GPU's compute capability (90): machine code for others stays behind.
set -euo pipefail
cd "$(dirname "$0")/../.."

vllm=0.32.0
python_version=${PYTHON_VERSION:-3.12}  # of the GPU machine
arch=${GPU_ARCH:-90}
most=$((50 << 20)) # bytes to carry

# As pip would write it for an installed package; the modules come from the checkout.
metadata() {
    local version folder
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' vllm_tailorkv/__init__.py)
    folder=$1/vllm_tailorkv-$version.dist-info
    mkdir -p "$folder"
    printf 'Metadata-Version: 2.1\nName: vllm_tailorkv\nVersion: %s\n' "$version" \
        >"$folder/METADATA"
    printf '[vllm.general_plugins]\ntailorkv = vllm_tailorkv.plugin:register\n' \
        >"$folder/entry_points.txt"
}

if [[ ${1:-} == --metadata ]]; then
    metadata "${2:?a folder}"
    exit
fi

pip() {
    local platforms=()
    for glibc in 39 35 34 31 28 27 26 24 17; do
        platforms+=(--platform "manylinux_2_${glibc}_x86_64")
    done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
    "${PYTHON:-python3}" -m pip --disable-pip-version-check "$1" -q --no-deps \
        --only-binary=:all: --implementation cp --python-version "$python_version" \
        "${platforms[@]}" "${@:2}"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir "$site"

echo "== vLLM $vllm"
pip download -d "$work" "vllm==$vllm"
"${PYTHON:-python3}" -m zipfile -e "$work"/vllm-"$vllm"-*.whl "$site"
rm "$work"/*.whl
# Its own ops and FlashAttention 3; other libraries are for other models and other GPUs.
kept=(
    vllm/_C_stable_libtorch.abi3.so
    vllm/cumem_allocator.abi3.so
    vllm/spinloop.abi3.so
    vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
)
for library in "${kept[@]}"; do
    [[ -f $site/$library ]] || { echo "carry.sh: vLLM $vllm has no $library" >&2; exit 1; }
    mv "$site/$library" "$site/$library.kept"
done
find "$site" -name '*.so' -delete
for library in "${kept[@]}"; do mv "$site/$library.kept" "$site/$library"; done
"${PYTHON:-python3}" benchmarks/gpu/prune_cubins.py "$arch" "${kept[@]/#/$site/}"
rm -rf "$site"/vllm/vllm-rs "$site"/vllm/third_party/fmha_sm100 \
    "$site"/vllm/third_party/deep_gemm/include

echo "== wheels"
# Into another folder: pip would put aside what it finds of vLLM's.
pip install --no-compile --target "$work/wheels" -r benchmarks/gpu/carry_wheels.txt
cp -r "$work/wheels/." "$site/"
metadata "$site"

echo "== packing"
rm -rf .gpu/site
mkdir -p .gpu/site
tar -C "$site" -c . | xz -T0 -6 >.gpu/site/site.tar.xz
cat >.gpu/site/unpack.sh <<'UNPACK'
# Fills /tmp/site.
set -eu
cd "$(dirname "$0")"
rm -rf /tmp/site
mkdir /tmp/site
xz -d -T0 <site.tar.xz | tar -C /tmp/site -x
# Else every engine compiles all of it.
"${PYTHON:-python3}" -m compileall -q -j0 /tmp/site || true
du -sh /tmp/site
UNPACK
if (($(stat -c %s .gpu/site/site.tar.xz) > most)); then
    echo "carry.sh: .gpu/site is over $((most >> 20)) MiB" >&2
    exit 1
fi
du -sm .gpu/site
