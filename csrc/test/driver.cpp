// Standalone checks of csrc without Python, to be built with a sanitizer: `make sanitize`, `make tsan`. The
// argument is the seed. Prints "ok" and exits 0, or says which check failed and exits 1.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "crc32c.h"
#include "support.h"

int main(int argc, char** argv) {
  using attr_engine::test::Random;
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const std::string name = std::to_string(seed);
  Random random(seed);
  const auto start = std::chrono::steady_clock::now();
  try {
    attr_engine::test::CheckStreams(random);
    attr_engine::test::CheckFaults(random);
#ifndef __SANITIZE_THREAD__  // slow there, and about what one thread does
    attr_engine::test::CheckBytes(random);
    attr_engine::test::CheckHostile(random);
#endif
  } catch (const std::exception& error) {
    (void)std::fprintf(stderr, "seed %s: unexpected exception: %s\n", name.c_str(), error.what());
    return 1;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("ok (seed %s, crc32c by %s, %.1f s)\n", name.c_str(), attr_engine::Crc32cImplementation(),
              seconds.count());
  return 0;
}
