// libFuzzer entry of the header parser: `make fuzz`. An input is a header after 4 bytes, little endian, that
// say how many bytes of data follow it.

#include "inputs.h"

// NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  int64_t payload = 0;
  for (size_t i = 4; i-- > 0;) payload = payload << 8 | data[i];
  (void)attr_engine::test::TryHeader(data + 4, size - 4, payload);
  return 0;
}
