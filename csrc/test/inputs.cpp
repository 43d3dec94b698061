#include "inputs.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "header.h"

namespace attr_engine::test {
namespace {

constexpr std::array<const char*, 4> kDTypes = {"F16", "BF16", "F32", "I64"};

// Takes numbers from the front of `bytes`, zeros when they are used up.
class Numbers {
 public:
  explicit Numbers(const Bytes& bytes) : bytes_(bytes) {}

  // Mostly small, now and then any 64 bits.
  int64_t Next() {
    const uint8_t first = Byte();
    if (first < 0xF0) return first % 16;
    if (first < 0xF8) return static_cast<int64_t>((uint64_t{1} << Byte() % 64) - (first & 1));
    uint64_t number = 0;
    for (int i = 0; i < 8; ++i) number = number << 8 | Byte();
    return static_cast<int64_t>(number);
  }
  uint8_t Byte() { return at_ < bytes_.size() ? bytes_[at_++] : 0; }

 private:
  const Bytes& bytes_;
  size_t at_ = 0;
};

Plan MakePlan(Numbers& numbers, size_t tensors) {
  Plan plan;
  const size_t batches = numbers.Byte() % 4;
  int64_t reached = 0;
  for (size_t b = 0; b < batches; ++b) {
    reached += numbers.Byte() % 4;
    plan.ends.push_back(numbers.Byte() == 0xFF ? numbers.Next() : std::max<int64_t>(1, reached));
  }
  const auto tracks =
      static_cast<size_t>(std::clamp<int64_t>(plan.ends.empty() ? 0 : plan.ends.back(), 0, 20));
  for (size_t i = 0; i < tracks; ++i) plan.shards.push_back(numbers.Byte() == 0xFF ? 1 : 0);
  for (size_t f = 0; f < tensors; ++f) {
    Field field;
    field.tensor = numbers.Byte() == 0xFF ? static_cast<size_t>(numbers.Next()) : f;
    const uint8_t how = numbers.Byte();
    if ((how & 1) != 0) field.to = static_cast<DType>(how >> 1 & 3);
    field.refuse_nonfinite = (how & 8) != 0;
    for (size_t i = 0; i < tracks; ++i) {
      field.starts.push_back(numbers.Next());
      field.rows.push_back(numbers.Next());
      if ((how & 16) != 0) field.checksums.push_back(static_cast<uint32_t>(numbers.Next()));
    }
    for (size_t b = 0; b < batches; ++b) field.frames.push_back((how & 32) != 0 ? numbers.Next() : 15);
    if ((how & 64) != 0) field.pad_row.assign(static_cast<size_t>(numbers.Next() & 0xFF), 0xAB);
    field.slot_offset = (how & 128) != 0 ? static_cast<size_t>(numbers.Next()) : f * 4096;
    plan.fields.push_back(std::move(field));
  }
  return plan;
}

}  // namespace

bool TryHeader(const uint8_t* text, size_t size, int64_t payload) {
  std::vector<TensorEntry> entries;
  try {
    entries = ParseHeader(reinterpret_cast<const char*>(text), size, payload);
  } catch (const std::invalid_argument& error) {
    CHECK(std::strlen(error.what()) > 0);
    return false;
  }
  int64_t reached = 0;
  std::set<std::string> names;
  for (const TensorEntry& entry : entries) {
    int64_t items = 1;
    for (const int64_t n : entry.shape) {
      CHECK(n >= 0);
      CHECK(!__builtin_mul_overflow(items, n, &items));
    }
    CHECK(entry.shape.size() <= 8 && ItemBytes(entry.dtype) > 0);
    CHECK(entry.begin == reached && entry.end - entry.begin == items * ItemBytes(entry.dtype));
    CHECK(names.insert(entry.name).second);
    reached = entry.end;
  }
  CHECK(reached == payload && entries.size() <= 4096);
  return true;
}

int TryShard(const File& at, const Bytes& file, const Bytes& bytes) {
  at.Write(file);
  Numbers numbers(bytes);
  std::vector<TensorSpec> specs;
  for (size_t i = numbers.Byte() % 4; i > 0; --i) {
    const uint8_t kind = numbers.Byte();
    const int64_t items = numbers.Byte() == 0xFF ? numbers.Next() : 1 + numbers.Byte() % 3;
    specs.push_back({std::string(1, static_cast<char>('a' + specs.size())), kDTypes[kind % 4], items});
  }
  const uint8_t how = numbers.Byte();
  const size_t slots = 1 + how % 3;
  Plan plan = MakePlan(numbers, specs.size());
  Bytes memory(slots * 3 * 4096, 0xEE);
  int batches = 0;
  try {
    auto shards = std::make_shared<ShardSet>(
        std::vector<ShardSpec>{{at.path(), static_cast<int64_t>(file.size())}}, specs, (how & 64) != 0);
    const auto ring = std::make_shared<Ring>(memory.data(), memory.size(), memory.size() / slots);
    if (how % 16 == 0 && plan.shards.empty() && shards->size() > 0) (void)shards->Open(0);
    Stream stream(std::move(shards), std::move(plan), ring, how >= 0xF8 ? 2 : 0, 0);
    for (;;) {
      const Stream::Result result = Await(stream);
      if (result.state == Stream::State::kEnd) return batches;
      ++batches;
      ring->Release(result.slot, (how & 32) != 0);
    }
  } catch (const ReadError& error) {
    CHECK(error.shard() >= ReadError::kNone && error.shard() < 1 && error.track() >= ReadError::kNone);
    CHECK(std::strlen(error.what()) > 0);
  }
  return batches;
}

size_t DataStart(const Bytes& file) {
  uint64_t length = 0;
  for (size_t i = std::min<size_t>(file.size(), 8); i-- > 0;) length = length << 8 | file[i];
  return static_cast<size_t>(std::min<uint64_t>(length, 1U << 30)) + 8;
}

std::vector<Bytes> SeedShards(Random& random) {
  std::vector<Bytes> seeds;
  for (int i = 0; i < 24; ++i) {
    std::vector<Tensor> tensors;
    for (int64_t t = Pick(random, 0, 4); t > 0; --t) {
      const std::string name(1, static_cast<char>('a' + tensors.size()));
      const char* dtype = kDTypes[random() % kDTypes.size()];
      Tensor tensor{{name, dtype, 1}, {}, {}};
      int64_t items = 1;
      for (int64_t rank = Pick(random, 0, 3); rank > 0; --rank) {
        tensor.shape.push_back(Pick(random, rank == 1 ? 0 : 1, 9));
        items *= tensor.shape.back();
      }
      tensor.data = RandomItems(random, dtype, items, Floats::kModest);
      tensors.push_back(std::move(tensor));
    }
    seeds.push_back(ShardBytes(tensors, OneIn(random, 2) ? 0 : static_cast<size_t>(Pick(random, 1, 40))));
  }
  return seeds;
}

void Mutate(Random& random, Bytes& bytes, const Bytes& other) {
  static const std::vector<std::string> words = {"{",
                                                 "}",
                                                 "[",
                                                 "]",
                                                 ",",
                                                 ":",
                                                 "\"",
                                                 "\\",
                                                 "\\u0061",
                                                 "\\ud800",
                                                 "null",
                                                 "0",
                                                 "-1",
                                                 "-0",
                                                 "1e3",
                                                 "1.0",
                                                 "00",
                                                 "true",
                                                 "NaN",
                                                 "\xEF\xBB\xBF",
                                                 "\xC0\x80",
                                                 "\xED\xA0\x80",
                                                 "\"a\"",
                                                 "{}",
                                                 "[]",
                                                 "\"F16\"",
                                                 "\"dtype\":",
                                                 "\"shape\":[",
                                                 "\"data_offsets\":[",
                                                 "\"__metadata__\":{},",
                                                 "9223372036854775807",
                                                 "9223372036854775808",
                                                 "18446744073709551616",
                                                 "4294967296",
                                                 "2147483648",
                                                 " ",
                                                 "\t"};
  constexpr std::array<uint8_t, 8> kBytes = {0, 1, 0x7F, 0x80, 0xFF, ' ', '"', '0'};
  const auto place = [&](size_t size) {
    // Mostly in the header, which is where the decisions are made.
    const size_t end = OneIn(random, 4) ? size : std::min(size, DataStart(bytes));
    return static_cast<ptrdiff_t>(random() % (end + 1));
  };
  for (int64_t n = Pick(random, 1, OneIn(random, 4) ? 12 : 2); n > 0; --n) {
    const auto size = static_cast<ptrdiff_t>(bytes.size());
    const ptrdiff_t at = place(bytes.size());
    const ptrdiff_t run =
        std::min(size - at, static_cast<ptrdiff_t>(Pick(random, 1, OneIn(random, 4) ? 200 : 4)));
    switch (Pick(random, 0, 8)) {
      case 0:
        if (at < size) bytes[static_cast<size_t>(at)] ^= static_cast<uint8_t>(1U << random() % 8);
        break;
      case 1:
        if (at < size) bytes[static_cast<size_t>(at)] = kBytes[random() % kBytes.size()];
        break;
      case 2: {
        const std::string& word = words[random() % words.size()];
        bytes.insert(bytes.begin() + at, word.begin(), word.end());
        break;
      }
      case 3:
        bytes.erase(bytes.begin() + at, bytes.begin() + at + run);
        break;
      case 4: {
        const Bytes copy(bytes.begin() + at, bytes.begin() + at + run);
        bytes.insert(bytes.begin() + place(bytes.size()), copy.begin(), copy.end());
        break;
      }
      case 5:
        bytes.resize(static_cast<size_t>(at));
        if (!OneIn(random, 3)) {
          const auto from = static_cast<ptrdiff_t>(random() % (other.size() + 1));
          bytes.insert(bytes.end(), other.begin() + from, other.end());
        }
        break;
      case 6:  // a digit, so that numbers stay numbers
        for (ptrdiff_t i = at; i < size; ++i) {
          uint8_t& byte = bytes[static_cast<size_t>(i)];
          if (byte < '0' || byte > '9') continue;
          byte = static_cast<uint8_t>('0' + random() % 10);
          break;
        }
        break;
      case 7:  // the length of the header, right again or nearly
        if (bytes.size() >= 8) {
          const auto close = std::find(bytes.rbegin(), bytes.rend(), '}');
          const auto length = static_cast<uint64_t>(bytes.rend() - close) - 8 + random() % 3;
          for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(length >> (8 * i));
        }
        break;
      default:
        if (bytes.size() >= 8) {
          const uint64_t length = random() >> random() % 64;
          for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(length >> (8 * i));
        }
        break;
    }
    if (bytes.size() > 20000) bytes.resize(20000);
  }
}

}  // namespace attr_engine::test
