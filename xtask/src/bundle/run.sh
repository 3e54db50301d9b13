#!/bin/sh
# Reports on this machine's GPU with each build in this folder that starts here; see README.txt.
#
# usage: ./run.sh [--seconds N] [--output DIR] [--quick] [--peft PYTHON]
#
#   --seconds N      all of it ends by then (540)
#   --output DIR     where the results go (gpu-report-results)
#   --quick          small sizes: whether it works, not how fast; also on software drivers
#   --peft PYTHON    a Python with torch, transformers and peft: measured in turn, where peft_bench.py is in this folder
set -u
here=$(cd "$(dirname "$0")" && pwd)
started=$(date +%s)

seconds=540
output=gpu-report-results
quick=
peft=
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=${2:?"--seconds wants a number"}; shift ;;
        --output) output=${2:?"--output wants a folder"}; shift ;;
        --peft) peft=${2:?"--peft wants a Python"}; shift ;;
        --quick) quick=--quick ;;
        --help | -h) usage; exit 0 ;;
        *) echo "run.sh: $1 is no option of mine" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
case $seconds in
    '' | *[!0-9]*) echo "run.sh: --seconds $seconds: expected a whole number" >&2; exit 2 ;;
esac
mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)

say() { echo "run.sh: $*" | tee -a "$output/summary.txt"; }
: >"$output/summary.txt"
remaining() { echo $((seconds - $(date +%s) + started)); }
has() { command -v "$1" >/dev/null 2>&1; }

# What the machine says of itself.
{
    date
    uname -a
    grep -m 1 'model name' /proc/cpuinfo
    grep MemTotal /proc/meminfo
    cat /etc/os-release
    ldd --version 2>&1 | head -n 1
} >"$output/machine.txt" 2>&1
if has nvidia-smi; then
    nvidia-smi >"$output/nvidia-smi.txt" 2>&1
    nvidia-smi -q >"$output/nvidia-smi-q.txt" 2>&1
fi
if has vulkaninfo; then vulkaninfo --summary >"$output/vulkaninfo.txt" 2>&1; fi
[ -n "${XDG_RUNTIME_DIR:-}" ] || export XDG_RUNTIME_DIR=/tmp

# Kernels for CUDA are compiled by LLVM, which takes exp, sin and their like from NVIDIA's libdevice.10.bc.
find_libdevice() {
    for root in "${CUDA_PATH:-}" "$here/cuda" /usr/local/cuda /usr/local/cuda-* /opt/cuda /usr/lib/cuda \
        /usr/lib/nvidia-cuda-toolkit /usr; do
        file=$root/nvvm/libdevice/libdevice.10.bc
        if [ -n "$root" ] && [ -f "$file" ]; then echo "$file"; return; fi
        file=$root/libdevice/libdevice.10.bc
        if [ -n "$root" ] && [ -f "$file" ]; then echo "$file"; return; fi
    done
    # NVIDIA's wheels and Triton, which comes with PyTorch, have it too.
    for python in "$peft" python3 python; do
        has "${python:-no-python}" || continue
        "$python" - <<'PYTHON' 2>/dev/null && return
import glob, site, sys
folders = site.getsitepackages() + [site.getusersitepackages()] + sys.path
inside = ["nvidia/*/nvvm/libdevice", "nvidia/*/*/nvvm/libdevice", "triton/backends/nvidia/lib", "triton/**/lib"]
for folder in folders:
    for pattern in inside:
        found = glob.glob(f"{folder}/{pattern}/libdevice.10.bc", recursive=True) if folder else []
        if found:
            print(found[0])
            sys.exit(0)
sys.exit(1)
PYTHON
    done
    if [ -n "${CONDA_PREFIX:-}" ]; then find "$CONDA_PREFIX" -name libdevice.10.bc 2>/dev/null | head -n 1; fi
}
# The folder of the build that has this backend.
folder_of() {
    for folder in cuda vulkan wgpu; do
        if [ -x "$here/$folder/trainer" ] && grep -qx "$1" "$here/$folder/backends"; then echo "$here/$folder"; return; fi
    done
}
if [ -n "$(folder_of cuda)" ]; then
    libdevice=$(find_libdevice)
    if [ -n "$libdevice" ]; then
        say "libdevice: $libdevice"
        CUDA_PATH=$output/cuda-path
        mkdir -p "$CUDA_PATH/nvvm/libdevice" && cp "$libdevice" "$CUDA_PATH/nvvm/libdevice/libdevice.10.bc"
        export CUDA_PATH
    else
        say "libdevice.10.bc was not found: the CUDA build needs it. Install NVIDIA's CUDA toolkit, or" \
            "'pip install nvidia-cuda-nvcc-cu12', or set CUDA_PATH to a folder with nvvm/libdevice/libdevice.10.bc"
    fi
fi

# Containers with NVIDIA's driver often lack the file that names it to Vulkan, or the loader.
libraries=$(ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null)
has_library() { echo "$libraries" | grep -q "$1"; }
if has_library libGLX_nvidia.so.0 && [ -z "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] &&
    ! ls /etc/vulkan/icd.d/nvidia* /usr/share/vulkan/icd.d/nvidia* >/dev/null 2>&1; then
    cat >"$output/nvidia_icd.json" <<'JSON'
{"file_format_version": "1.0.0", "ICD": {"library_path": "libGLX_nvidia.so.0", "api_version": "1.3"}}
JSON
    export VK_DRIVER_FILES="$output/nvidia_icd.json" VK_ICD_FILENAMES="$output/nvidia_icd.json"
    say "Vulkan: NVIDIA's driver is here and no file names it; $output/nvidia_icd.json does now"
fi
if ! has_library libvulkan.so.1 && [ -f "$here/lib/libvulkan.so.1" ]; then
    export LD_LIBRARY_PATH="$here/lib:${LD_LIBRARY_PATH:-}"
    say "Vulkan: this machine has no loader; the one in this folder is used"
fi

weight() { case $1 in cuda) echo 6 ;; *) echo 2 ;; esac; }

# The seconds of a build: its share of what is left among those that are still to come.
share() {
    sum=0
    for other in "$@"; do sum=$((sum + $(weight "$other"))); done
    echo $(($(remaining) * $(weight "$1") / sum))
}

# Runs a build's report: run BUILD SECONDS ARGUMENT... Variables are global in sh: the loop below reads only `code` of these.
run() {
    name=$1 most=$2
    shift 2
    folder=$(folder_of "$name")
    libraries_of_build=
    # A library that the system has is the better one: graphics drivers load it as well.
    if ldd "$folder/trainer" 2>/dev/null | grep -q 'not found'; then libraries_of_build=$folder/lib; fi
    set -- "$folder/trainer" gpu-report --backend "$name" --seconds "$most" --output "$output/$name" "$@"
    if has timeout; then set -- timeout -k 5 $((most + 10)) "$@"; fi
    if [ -n "$libraries_of_build" ]; then
        set -- env LD_LIBRARY_PATH="$libraries_of_build:${LD_LIBRARY_PATH:-}" "$@"
    fi
    mkdir -p "$output/$name"
    { "$@"; echo $? >"$output/$name/exit-code"; } 2>&1 | tee -a "$output/$name/log.txt"
    code=$(cat "$output/$name/exit-code")
}

builds=
for build in cuda vulkan wgpu; do [ -z "$(folder_of "$build")" ] || builds="$builds $build"; done
[ -n "$builds" ] || { say "there is no build in $here"; exit 1; }

reported=0 failed=0
# shellcheck disable=SC2086 # words of our own
set -- $builds
while [ $# -gt 0 ]; do
    build=$1
    rm -rf "${output:?}/$build"
    limit=$(share "$@")
    shift
    if [ "$limit" -lt 15 ]; then say "$build: left out, no time left"; continue; fi
    # Whether it starts at all, in a few seconds.
    begun=$(date +%s)
    run "$build" "$((limit < 60 ? limit : 60))" $quick --only device
    if ! grep -q '"is_software"' "$output/$build/report.json" 2>/dev/null; then
        say "$build: it does not start here: $(tail -n 1 "$output/$build/log.txt")"
        continue
    fi
    if [ -z "$quick" ] && grep -q '"is_software": true' "$output/$build/report.json"; then
        say "$build: only a software driver answers, which is reported on with --quick"
        continue
    fi
    limit=$((limit - $(date +%s) + begun))
    set_peft=
    if [ -n "$peft" ] && [ -f "$here/peft_bench.py" ]; then set_peft=1; fi
    if [ -n "$set_peft" ]; then
        run "$build" "$limit" $quick --peft "$peft" --peft-script "$here/peft_bench.py"
        # Its numbers do not depend on our build.
        peft=
    else
        run "$build" "$limit" $quick
    fi
    reported=$((reported + 1))
    case $code in
        0) say "$build: reported, all checks pass: $output/$build/report.md" ;;
        124 | 137) say "$build: stopped at its time limit; what it had is in $output/$build/report.md"; failed=1 ;;
        *) say "$build: exit code $code: a check failed or the device did, see $output/$build/report.md"; failed=1 ;;
    esac
done
say "done after $(($(date +%s) - started)) s; everything is in $output"
[ "$reported" -gt 0 ] && [ "$failed" -eq 0 ]
