// libFuzzer entry of shard files and plans: `make fuzz`. An input is the number of bytes that make the plan,
// those bytes, and a file.

#include <algorithm>

#include "inputs.h"

// NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using attr_engine::test::Bytes;
  static const attr_engine::test::File file;
  if (size < 1) return 0;
  const size_t plan = std::min<size_t>(data[0], size - 1);
  const Bytes numbers(data + 1, data + 1 + plan);
  (void)attr_engine::test::TryShard(file, Bytes(data + 1 + plan, data + size), numbers);
  return 0;
}
