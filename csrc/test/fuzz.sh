#!/usr/bin/env bash
# What `make fuzz` does: fuzz.sh [EXECUTIONS of the header parser] [SECONDS of streams]. Finds clang with libFuzzer,
# or installs it where it may. The corpora stay in build/fuzz for the next time; a finding is written there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
executions=${1:-10000000}
seconds=${2:-60}
folder=build/fuzz
mkdir -p $folder/header $folder/stream

find_clang() {
  local name
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' > $folder/trial.cpp
  for name in clang++ $(compgen -c clang++- | sort -ru); do
    if "$name" -fsanitize=fuzzer,address $folder/trial.cpp -o $folder/trial 2> /dev/null; then
      clang=$name
      return
    fi
  done
  return 1
}

if ! find_clang; then
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "fuzz: installing clang and its runtime (about 1 min)"
    version=$(apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p' | head -1)
    apt-get install -y -qq clang "libclang-rt-$version-dev" > $folder/install.log 2>&1 || true
  fi
  if ! find_clang; then
    echo "fuzz: there is no clang++ with libFuzzer here; install it and run make fuzz again (Debian 12:" \
      "apt install clang libclang-rt-14-dev; Ubuntu, Fedora: clang and its compiler-rt package)."
    exit 1
  fi
fi

flags=(-std=c++17 -g -O1 -pthread -Icsrc -fno-sanitize-recover=all -fsanitize=fuzzer,address,undefined)
core=(csrc/crc32c.cpp csrc/convert.cpp csrc/header.cpp csrc/shards.cpp csrc/gather.cpp csrc/stream.cpp)
for name in header stream; do
  "$clang" "${flags[@]}" "${core[@]}" csrc/test/{support,inputs,fuzz_$name}.cpp -o $folder/fuzz_$name
done
make -s build/asan/mutate
build/asan/mutate seeds $folder

run() { # name, options
  local name=$1
  shift
  echo "fuzz: $name, the log is in $folder/$name.log"
  if ! $folder/fuzz_$name $folder/$name -dict=csrc/test/header.dict -artifact_prefix=$folder/finding-$name- \
    -print_final_stats=1 "$@" > $folder/$name.log 2>&1; then
    tail -n 40 $folder/$name.log
    exit 1
  fi
  grep -E '^Done|number_of_executed_units|new_units_added|cov:' $folder/$name.log | tail -n 3
}
run header -runs="$executions" -max_len=2048
run stream -max_total_time="$seconds" -max_len=4096
echo "fuzz: no finding"
