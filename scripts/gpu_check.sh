#!/usr/bin/env bash
# Checks the CUDA backend on a GPU machine, offline and without node_modules.
#
# In: the working tree, Bun and/or Deno, a GPU; nvcc and compute-sanitizer where they are. Out: a line and, in
# DIR/gpu_check.jsonl, a JSON object for each step; DIR/gpu_check.log with all output; DIR/bench.jsonl; DIR/decode.jsonl, what
# soak and serve say; last a table. What cannot run is skipped with the reason. Exit status 1 if anything failed. Clocks and settings of the GPU are left alone.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() {
  cat <<'TEXT'
Usage: [BUN=/path/bun] [DENO=/path/deno] scripts/gpu_check.sh [options]

  --quick           fewer random worlds, a shorter bench, one round under the sanitizer
  --only A,B,...    of: doctor local load_store size order graph low_latency_graph shape decode failure worker process kill kill_mps
                    native soak serve bench sanitizer; and bench_low_latency, the part of the bench that is in its name; with 2 to
                    7 GPUs bench is also made with as many ranks, a GPU each (bench_links.jsonl). kill is without MPS, where
                    processes take turns on a GPU, and takes minutes; kill_mps needs --mps
  --soak N          decode steps of the step "soak", default 200000, each runtime for a minute at most; more without that limit
  --mps             start CUDA MPS privately for the steps "process" and "kill_mps", and stop it after
  --programs DIR    compiled programs of tests/cuda (small_world, overlap, ...), and scripts/decode/decode.cu as libdecode.so,
                    for a machine without nvcc
  --commit NAME     what the results name as the commit; default that of the working tree
  --out DIR         where the results go; default build/gpu_check
  --help            this text

Without BUN and DENO, the bun and deno of the path are used. DEEPEP_LIBRARY_CUDA names another library.
TEXT
}

quick='' only='' with_mps='' programs='' soak='' commit='' out='build/gpu_check'
while (($# > 0)); do
  case $1 in
    --quick) quick=1 ;;
    --mps) with_mps=1 ;;
    --only | --programs | --soak | --commit | --out)
      if (($# < 2)); then
        echo "$1 needs a value" >&2
        exit 2
      fi
      case $1 in
        --only) only=$2 ;;
        --programs) programs=$2 ;;
        --soak) soak=$2 ;;
        --commit) commit=$2 ;;
        *) out=$2 ;;
      esac
      shift
      ;;
    --help)
      usage
      exit 0
      ;;
    *)
      echo "$1 is not an option" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done

bun=${BUN:-$(command -v bun || true)}
deno=${DENO:-$(command -v deno || true)}
if [[ -z $bun && -z $deno ]]; then
  echo 'there is neither Bun nor Deno: name one with BUN=/path/bun or DENO=/path/deno' >&2
  exit 2
fi
runtimes=()
[[ -n $bun ]] && runtimes+=(bun)
[[ -n $deno ]] && runtimes+=(deno)

mkdir -p "$out"
out=$(cd "$out" && pwd)
results=$out/gpu_check.jsonl log=$out/gpu_check.log summary=$out/summary.txt
: >"$results"
: >"$log"
: >"$out/decode.jsonl"
work=$(mktemp -d)
mps_runs=''

stop_mps() {
  [[ -n $mps_runs ]] || return 0
  mps_runs=''
  echo quit | timeout 20 nvidia-cuda-mps-control >>"$log" 2>&1
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}
finish() {
  stop_mps
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

export NO_COLOR=1 DENO_NO_UPDATE_CHECK=1 DENO_NO_PROMPT=1 DENO_DIR=${DENO_DIR:-$work/deno}
[[ -n $programs && -e $programs/libdecode.so ]] && DEEPEP_DECODE_LIBRARY=$(cd "$programs" && pwd)/libdecode.so
[[ -n ${DEEPEP_DECODE_LIBRARY:-} ]] && export DEEPEP_DECODE_LIBRARY
random='' rounds=20
if [[ -n $quick ]]; then
  random=2 rounds=2
  export DEEPEP_TEST_RANDOM=${DEEPEP_TEST_RANDOM:-$random}
fi

have_gpu=''
if [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then have_gpu=1; fi

num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then num_gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .); fi

# Text as a JSON string.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\t'/ }
  printf '"%s"' "${text//$'\n'/ }"
}

# Whether a step was asked for.
wanted() {
  [[ -z $only || ,$only, == *,$1,* ]]
}

num_failed=0
# report STEP RUNTIME STATUS SECONDS PASSED FAILED SKIPPED REASON
report() {
  printf '{"step":%s,"runtime":%s,"status":%s,"seconds":%s,"passed":%s,"failed":%s,"skipped":%s,"reason":%s}\n' \
    "$(json "$1")" "$(json "$2")" "$(json "$3")" "$4" "$5" "$6" "$7" "$(json "$8")" >>"$results"
  printf '%-7s %6s s  %-34s %-5s %4s passed %3s failed %3s skipped  %s\n' "$3" "$4" "$1" "$2" "$5" "$6" "$7" "$8" |
    tee -a "$summary.part"
  [[ $3 == failed ]] && num_failed=$((num_failed + 1))
  return 0
}

# The number before a word in the summary of a test runner: Bun's lines `12 pass`, Deno's `ok | 3 passed (12 steps) | ...`.
count() {
  local file=$1 word=$2 steps=$3
  local line
  if [[ $steps == bun ]]; then
    awk -v word="$word" '$2 == word && $1 ~ /^[0-9]+$/ { n = $1 } END { print n + 0 }' "$file"
    return
  fi
  line=$(grep -E '^(ok|FAILED) \| [0-9]+ passed' "$file" | tail -n 1)
  # Subtests are called steps, and counted beside the tests.
  sed -nE "s/.*[| ]([0-9]+) $word( \(([0-9]+) steps?\))?.*/\1 \3/p" <<<"$line" | awk '{ n = $1 + $2 } END { print n + 0 }'
}

# step NAME RUNTIME LIMIT COMMAND...: runs it bounded, with its output in the log. A runner's tests are counted.
step() {
  local name=$1 runtime=$2 limit=$3
  shift 3
  local output=$work/output begin end status=passed code seconds passed=0 failed=0 skipped=0 reason=''
  begin=$(date +%s.%N)
  printf '\n=== %s (%s): %s\n' "$name" "$runtime" "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1
  code=$?
  end=$(date +%s.%N)
  seconds=$(awk -v a="$begin" -v b="$end" 'BEGIN { printf "%.1f", b - a }')
  cat "$output" >>"$log"
  if [[ " $* " == *' test '* ]]; then
    if [[ $runtime == bun ]]; then
      passed=$(count "$output" pass bun) failed=$(count "$output" fail bun) skipped=$(count "$output" skip bun)
    else
      passed=$(count "$output" passed deno) failed=$(count "$output" failed deno) skipped=$(count "$output" ignored deno)
    fi
    if ((code == 0 && passed == 0)); then status=skipped; fi
    reason=$(sed -nE 's/ \.\.\. ignored.*$//; s/ \[[0-9.]+ m?s\]$//; s/.*\(skipped: (.*)\)$/\1/p' "$output" | sort -u | paste -sd ';')
    # Where there is a GPU, a library that does not start is no reason to skip.
    if [[ $status == skipped && -n $have_gpu && $reason == *'no cuda'* ]]; then status=failed failed=1; fi
  elif ((code == 77)); then
    status=skipped skipped=1 reason=$(tail -n 1 "$output")
  elif ((code == 0)); then
    passed=1
  fi
  if ((code != 0 && code != 77)); then
    status=failed
    ((failed > 0)) || failed=1
    reason="exit status $code"
    ((code == 124 || code == 137)) && reason="ended after $limit s"
  fi
  report "$name" "$runtime" "$status" "$seconds" "$passed" "$failed" "$skipped" "$reason"
  if [[ $status == failed ]]; then tail -n 60 "$output" | sed 's/^/    /'; fi
}

skip() {
  report "$1" "$2" skipped 0 0 0 1 "$3"
}

# suite NAME FILE [VARIABLE=VALUE...]: a test file under every runtime.
suite() {
  local name=$1 file=$2 runtime
  shift 2
  wanted "$name" || return 0
  for runtime in "${runtimes[@]}"; do
    if [[ $runtime == bun ]]; then
      step "$name" bun 300 env "$@" "$bun" test --timeout 120000 "./$file"
    else
      step "$name" deno 300 env "$@" "$deno" test -A --no-check --no-lock --import-map tests/support/import_map.json "$file"
    fi
  done
}

# script NAME LIMIT FILE ARGUMENT...: a script under every runtime, or with `one=1` before it under the first.
script() {
  local name=$1 limit=$2 runtime
  shift 2
  for runtime in "${runtimes[@]:0:${one:-2}}"; do
    if [[ $runtime == bun ]]; then
      step "$name" bun "$limit" "$bun" "$@"
    else
      step "$name" deno "$limit" "$deno" run -A --no-check --no-lock "$@"
    fi
    grep -E '^\{"(soak|serve)":' "$work/output" >>"$out/decode.jsonl"
  done
}

# gpu_script NAME LIMIT FILE ARGUMENT...: the same, where there is a GPU.
gpu_script() {
  if [[ -n $have_gpu ]]; then script "$@"; else skip "$1" "${runtimes[0]}" 'there is no GPU'; fi
}

start_mps() {
  if ! command -v nvidia-cuda-mps-control >/dev/null; then
    echo 'MPS was asked for, but there is no nvidia-cuda-mps-control' | tee -a "$log"
    return 1
  fi
  export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/mps_log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  if timeout 20 nvidia-cuda-mps-control -d >>"$log" 2>&1; then
    mps_runs=1
    return 0
  fi
  echo 'CUDA MPS could not be started' | tee -a "$log"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  return 1
}

# The file of a native test program: given, or compiled; nothing when it cannot be had.
program() {
  local name=$1
  if [[ -n $programs ]]; then
    [[ -x $programs/$name ]] && echo "$programs/$name"
    return 0
  fi
  if [[ ! -e $work/$name ]]; then
    command -v nvcc >/dev/null || return 0
    local arch=(-arch=native)
    [[ -n $have_gpu ]] || arch=(-gencode 'arch=compute_90,code=sm_90')
    timeout 300 nvcc -std=c++20 -O2 -I. "${arch[@]}" "tests/cuda/$name.cu" -o "$work/$name" >>"$log" 2>&1 || return 1
  fi
  echo "$work/$name"
}

native() {
  local name=$1 file
  shift
  if ! file=$(program "$name"); then
    report "native $name" cuda failed 0 0 1 0 'it does not compile'
  elif [[ -z $file ]]; then
    skip "native $name" cuda 'there is no nvcc, and no compiled program was given'
  else
    step "native $name" cuda 180 "$file" "$@"
  fi
}

# sanitized TOOL RANKS LOW_LATENCY: the small world under a tool of compute-sanitizer, with low latency (1) or without (0).
sanitized() {
  local tool=$1 ranks=$2 low_latency=$3 file sanitizer
  local name="sanitizer $tool, $ranks ranks"
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  file=$(program small_world) || file=''
  if [[ -z $have_gpu ]]; then
    skip "$name" cuda 'there is no GPU'
  elif [[ -z $sanitizer ]]; then
    skip "$name" cuda 'there is no compute-sanitizer'
  elif [[ -z $file ]]; then
    skip "$name" cuda 'there is no small_world: no nvcc, and no compiled program was given'
  else
    step "$name" cuda 400 "$sanitizer" --tool "$tool" --error-exitcode 1 "$file" --ranks "$ranks" --rounds "$((rounds > 4 ? 4 : rounds))" \
      --low-latency "$low_latency"
  fi
}

: >"$summary.part"
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[[ -n $commit ]] || commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
printf '{"step":"machine","gpu":%s,"commit":%s,"date":%s,"bun":%s,"deno":%s}\n' "$(json "${gpu:-none}")" "$(json "$commit")" \
  "$(json "$(date -u +%Y-%m-%dT%H:%M:%SZ)")" "$(json "$([[ -n $bun ]] && "$bun" --version)")" \
  "$(json "$([[ -n $deno ]] && "$deno" --version | head -n 1)")" >>"$results"

if wanted doctor; then
  script doctor 120 scripts/doctor.ts
  sed -n '/^=== doctor/,$p' "$log" | sed '/^=== doctor (deno)/,$d'
fi

suite local tests/cuda_test.ts
suite load_store tests/cuda_test.ts DEEPEP_CUDA_TMA=0 DEEPEP_CUDA_TURN_SCALES=11
suite size tests/cuda_size_test.ts
suite order tests/cuda_order_test.ts
suite graph tests/cuda_graph_test.ts
suite low_latency_graph tests/cuda_low_latency_graph_test.ts
suite shape tests/cuda_graph_shape_test.ts
suite decode tests/cuda_decode_test.ts DEEPEP_CUDA_TURN_SCALES=-1
suite failure tests/cuda_failure_test.ts DEEPEP_CUDA_TURN_SCALES=11
suite worker tests/cuda_worker_test.ts
if wanted process; then
  [[ -n $with_mps ]] && start_mps
  suite process tests/cuda_process_test.ts
  stop_mps
fi
suite kill tests/cuda_kill_test.ts DEEPEP_ALLOW_TIME_SLICING=1
if wanted kill_mps && [[ -n $with_mps ]] && start_mps; then
  suite kill_mps tests/cuda_kill_test.ts
  stop_mps
fi

if wanted native; then
  for source in tests/cuda/*.cu; do native "$(basename "$source" .cu)"; done
  # A program that ends as soon as its buffers are gone, many times: what a thread of the library still did would show now and then.
  if file=$(program small_world) && [[ -n $file ]]; then
    step 'native small_world, 20 exits' cuda 180 bash -c 'for i in {1..20}; do "$0" --rounds 1 || exit; done' "$file"
  else
    skip 'native small_world, 20 exits' cuda 'there is no small_world: no nvcc, and no compiled program was given'
  fi
fi

if wanted soak; then
  flags=(--backend cuda --steps "${soak:-200000}")
  limit=86400
  if [[ -z $soak ]]; then
    limit=150
    flags+=(--seconds "$([[ -n $quick ]] && echo 15 || echo 60)")
  fi
  gpu_script soak "$limit" scripts/soak.ts "${flags[@]}"
fi
if wanted serve; then
  flags=(--backend cuda --port 0 --load 8 --seconds "$([[ -n $quick ]] && echo 5 || echo 20)")
  gpu_script serve 120 scripts/serve.ts "${flags[@]}"
  gpu_script serve_rate 120 scripts/serve.ts "${flags[@]}" --rate 500
fi

flags=(--backend cuda --commit "$commit" --json "$out/bench.jsonl")
[[ -n $quick ]] && flags+=(--quick)
if wanted bench; then one=1 gpu_script bench 600 scripts/bench.ts "${flags[@]}"; fi
# With several GPUs a rank on each, besides.
if wanted bench && ((num_gpus > 1 && num_gpus < 8)); then
  links=("${flags[@]/%bench.jsonl/bench_links.jsonl}" --ranks "$num_gpus" --sweep-ranks 1)
  if [[ -z $quick ]]; then
    links+=(--sweep-sms 4,8,12,16,20,24,32,48 --ll-tokens 1,8,32,128,512 --sweep-tokens 1,2,4,8,16,32,64,256,1024,4096,8192 --limit 200)
  fi
  one=1 gpu_script bench_links 600 scripts/bench.ts "${links[@]}"
fi
if [[ ,$only, == *,bench_low_latency,* ]]; then one=1 gpu_script bench_low_latency 600 scripts/bench.ts "${flags[@]}" --only low_latency; fi

if wanted sanitizer; then
  # racecheck knows barriers alone, not the words in shared memory that warps of a low-latency kernel release and acquire: it
  # takes all that they pass on so for races. The emulated device of tests/emulator follows both, and its races build looks there.
  for ranks in 1 3; do
    sanitized memcheck "$ranks" 1
    sanitized racecheck "$ranks" 0
  done
fi

{
  printf '%s, commit %s\n' "${gpu:-no GPU}" "$commit"
  cat "$summary.part"
} >"$summary"
rm -f "$summary.part"
printf '\n'
cat "$summary"
printf '%s failed; results in %s\n' "$num_failed" "$out"
exit "$((num_failed > 0))"
