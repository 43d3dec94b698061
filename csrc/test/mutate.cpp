// Mutates valid shards and plans, and gives them to the parser and the stream: `mutate INPUTS SEED`. To be
// built with a sanitizer: `make asan`.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "inputs.h"

namespace attr_engine::test {
namespace {

// Numbers that make a plan which a seed can often serve, with some bytes changed.
Bytes PlanNumbers(Random& random) {
  Bytes numbers(static_cast<size_t>(Pick(random, 0, 120)));
  for (uint8_t& number : numbers) number = static_cast<uint8_t>(random() % 16);
  for (int64_t n = Pick(random, 0, 6); n > 0 && !numbers.empty(); --n) {
    numbers[random() % numbers.size()] = static_cast<uint8_t>(random());
  }
  return numbers;
}

int Run(int64_t inputs, uint64_t seed) {
  Random random(seed);
  std::vector<Bytes> pool = SeedShards(random);
  const size_t seeds = pool.size();
  const File file;
  int64_t headers = 0;
  int64_t batches = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    Bytes input = pool[random() % pool.size()];
    if (!OneIn(random, 10)) Mutate(random, input, pool[random() % pool.size()]);
    const size_t data = DataStart(input);
    bool accepted = false;
    if (data <= input.size()) {
      const size_t payload = input.size() - data;
      accepted = TryHeader(input.data() + 8, data - 8, static_cast<int64_t>(payload));
    }
    headers += accepted ? 1 : 0;
    batches += TryShard(file, input, PlanNumbers(random));
    // What was accepted is mutated further.
    if (accepted && pool.size() < 200) pool.push_back(input);
    if (accepted && OneIn(random, 20)) pool[seeds + random() % (pool.size() - seeds)] = std::move(input);
  }
  CHECK(headers > inputs / 20 && batches > inputs / 20);  // or nothing was tested
  std::printf("ok (seed %s: %s inputs, %s headers accepted, %s batches)\n", std::to_string(seed).c_str(),
              std::to_string(inputs).c_str(), std::to_string(headers).c_str(),
              std::to_string(batches).c_str());
  return 0;
}

void WriteSeed(const std::string& path, const Bytes& bytes) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  CHECK(file != nullptr && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
  CHECK(std::fclose(file) == 0);
}

int WriteSeeds(const std::string& folder) {
  Random random(1);
  int number = 0;
  for (const Bytes& file : SeedShards(random)) {
    const std::string name = "seed-" + std::to_string(number++);
    const size_t payload = file.size() - DataStart(file);
    Bytes header(4);
    for (size_t i = 0; i < 4; ++i) header[i] = static_cast<uint8_t>(payload >> (8 * i));
    header.insert(header.end(), file.begin() + 8, file.end() - static_cast<ptrdiff_t>(payload));
    WriteSeed(folder + "/header/" + name, header);
    Bytes stream = PlanNumbers(random);
    stream.insert(stream.begin(), static_cast<uint8_t>(stream.size()));
    stream.insert(stream.end(), file.begin(), file.end());
    WriteSeed(folder + "/stream/" + name, stream);
  }
  return 0;
}

}  // namespace
}  // namespace attr_engine::test

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "seeds") return attr_engine::test::WriteSeeds(argv[2]);
  const int64_t inputs = argc > 1 ? std::strtoll(argv[1], nullptr, 10) : 100000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  try {
    return attr_engine::test::Run(inputs, seed);
  } catch (const std::exception& error) {
    (void)std::fprintf(stderr, "seed %s: unexpected exception: %s\n", std::to_string(seed).c_str(),
                       error.what());
    return 1;
  }
}
