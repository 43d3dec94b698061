// Checksums, casts, the search for NaN and copies, against the plainest form of each.

#include <array>
#include <cmath>
#include <cstring>

#include "crc32c.h"
#include "support.h"

namespace attr_engine::test {
namespace {

constexpr std::array<DType, 4> kTypes = {DType::kF16, DType::kBF16, DType::kF32, DType::kF64};
constexpr std::array<const char*, 4> kNames = {"F16", "BF16", "F32", "F64"};

void CheckChecksum(Random& random) {
  CHECK(Crc32c("123456789", 9) == 0xE3069283U);  // the check value of RFC 3720
  CHECK(Crc32c(nullptr, 0) == 0);
  const Bytes zeros(32, 0);
  CHECK(Crc32c(zeros.data(), zeros.size()) == 0x8A9136AAU);
  for (int round = 0; round < 150; ++round) {
    const auto size = static_cast<size_t>(Pick(random, 0, 20000));
    const auto skip = static_cast<size_t>(Pick(random, 0, 9));
    const Bytes bytes = RandomItems(random, "U8", static_cast<int64_t>(skip + size), Floats::kAny);
    const uint8_t* data = bytes.data() + skip;  // any alignment
    const uint32_t whole = Crc32c(data, size);
    CHECK(whole == Crc32cPortable(data, size));
    const auto cut = static_cast<size_t>(Pick(random, 0, static_cast<int64_t>(size)));
    CHECK(whole == Crc32c(data + cut, size - cut, Crc32c(data, cut)));
  }
}

bool IsNan(const uint8_t* item, DType dtype) {
  Bytes wide(8);
  SlowCast(wide.data(), DType::kF64, item, dtype);
  double value = 0;
  std::memcpy(&value, wide.data(), sizeof value);
  return std::isnan(value);
}

void CheckCasts(Random& random) {
  for (size_t f = 0; f < kTypes.size(); ++f) {
    for (const DType to : kTypes) {
      const DType from = kTypes[f];
      for (int round = 0; round < 20; ++round) {
        const auto items = static_cast<size_t>(Pick(random, 0, 130));
        const auto skip_in = static_cast<size_t>(Pick(random, 0, 9));
        const auto skip_out = static_cast<size_t>(Pick(random, 0, 33));
        const Bytes values = RandomItems(random, kNames[f], static_cast<int64_t>(items),
                                         round % 2 == 0 ? Floats::kAny : Floats::kModest);
        Bytes in(skip_in);
        in.insert(in.end(), values.begin(), values.end());
        Bytes out(skip_out + items * SizeOf(to));
        Cast(out.data() + skip_out, to, in.data() + skip_in, from, items);
        for (size_t i = 0; i < items; ++i) {
          const uint8_t* got = out.data() + skip_out + i * SizeOf(to);
          const uint8_t* item = values.data() + i * SizeOf(from);
          Bytes expected(SizeOf(to));
          SlowCast(expected.data(), to, item, from);
          CHECK(IsNan(item, from) ? IsNan(got, to) : std::memcmp(got, expected.data(), SizeOf(to)) == 0);
        }
      }
    }
  }
}

void CheckFirstNonFinite(Random& random) {
  for (size_t t = 0; t < kTypes.size(); ++t) {
    const size_t size = SizeOf(kTypes[t]);
    for (int round = 0; round < 60; ++round) {
      const int64_t items = Pick(random, 0, 300);
      const auto skip = static_cast<size_t>(Pick(random, 0, 9));
      const Bytes values = RandomItems(random, kNames[t], items, Floats::kModest);
      Bytes data(skip);
      data.insert(data.end(), values.begin(), values.end());
      const auto count = static_cast<size_t>(items);
      CHECK(FirstNonFinite(data.data() + skip, kTypes[t], count) == count);
      if (items == 0) continue;
      const auto at = static_cast<size_t>(Pick(random, 0, items - 1));
      uint8_t* const item = data.data() + skip + at * size;
      Bytes infinity(8);
      const double value = OneIn(random, 2) ? -HUGE_VAL : std::nan("");
      std::memcpy(infinity.data(), &value, sizeof value);
      SlowCast(item, kTypes[t], infinity.data(), DType::kF64);
      CHECK(FirstNonFinite(data.data() + skip, kTypes[t], count) == at);
    }
  }
}

void CheckCopy(Random& random) {
  for (int round = 0; round < 100; ++round) {
    const int64_t size = Pick(random, 0, 1000);
    const auto skip_in = static_cast<size_t>(Pick(random, 0, 20));
    const auto skip_out = static_cast<size_t>(Pick(random, 0, 20));
    const Bytes in = RandomItems(random, "U8", size + static_cast<int64_t>(skip_in), Floats::kAny);
    Bytes out(static_cast<size_t>(size) + skip_out);
    CopyNonTemporal(out.data() + skip_out, in.data() + skip_in, static_cast<size_t>(size));
    CHECK(Bytes(in.begin() + static_cast<ptrdiff_t>(skip_in), in.end()) ==
          Bytes(out.begin() + static_cast<ptrdiff_t>(skip_out), out.end()));
  }
}

}  // namespace

void CheckBytes(Random& random) {
  CheckChecksum(random);
  CheckCasts(random);
  CheckFirstNonFinite(random);
  CheckCopy(random);
}

}  // namespace attr_engine::test
