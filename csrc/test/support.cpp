#include "support.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "crc32c.h"
#include "header.h"

namespace attr_engine::test {
namespace {

struct Format {
  int fraction;  // bits of the fraction
  int lowest;    // exponent of the smallest normal number
  int highest;   // exponent of the largest
};

Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {10, -14, 15};
    case DType::kBF16:
      return {7, -126, 127};
    case DType::kF32:
      return {23, -126, 127};
    default:
      return {52, -1022, 1023};
  }
}

uint64_t LoadBits(const uint8_t* in, size_t size) {
  uint64_t bits = 0;
  for (size_t i = size; i-- > 0;) bits = bits << 8 | in[i];
  return bits;
}

double Value(const uint8_t* in, DType dtype) {
  const Format format = FormatOf(dtype);
  const size_t size = SizeOf(dtype);
  const uint64_t bits = LoadBits(in, size);
  const double sign = (bits >> (8 * size - 1)) != 0 ? -1.0 : 1.0;
  const uint64_t fraction = bits & ((uint64_t{1} << format.fraction) - 1);
  const uint64_t largest = 2 * static_cast<uint64_t>(format.highest) + 1;
  const auto biased = static_cast<int>(bits >> format.fraction & largest);
  if (biased == 2 * format.highest + 1) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  const auto mantissa = static_cast<double>(fraction + (biased == 0 ? 0 : uint64_t{1} << format.fraction));
  return sign * std::ldexp(mantissa, std::max(biased, 1) - format.highest - format.fraction);
}

uint64_t Encode(double value, DType dtype) {
  const Format format = FormatOf(dtype);
  const uint64_t sign = std::signbit(value) ? uint64_t{1} << (8 * SizeOf(dtype) - 1) : 0;
  const uint64_t infinity = (2 * static_cast<uint64_t>(format.highest) + 1) << format.fraction;
  if (std::isnan(value)) return infinity | uint64_t{1} << (format.fraction - 1);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  const int exponent = std::max(std::ilogb(value), format.lowest);
  // In units of the last place; nearbyint rounds halves to even. A carry runs into the exponent by itself.
  const double places = std::nearbyint(std::ldexp(std::fabs(value), format.fraction - exponent));
  const auto above = static_cast<uint64_t>(exponent - format.lowest);
  const uint64_t magnitude = static_cast<uint64_t>(places) + (above << format.fraction);
  return sign | std::min(magnitude, infinity);
}

std::string Json(const Tensor& tensor, int64_t begin) {
  std::string shape;
  for (const int64_t size : tensor.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
  return "\"" + tensor.spec.name + "\":{\"dtype\":\"" + tensor.spec.dtype + "\",\"shape\":[" + shape +
         "],\"data_offsets\":[" + std::to_string(begin) + "," +
         std::to_string(begin + static_cast<int64_t>(tensor.data.size())) + "]}";
}

}  // namespace

int64_t Pick(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

bool OneIn(Random& random, int64_t n) { return Pick(random, 1, n) == 1; }

File::File() {
  const char* folder = std::getenv("TMPDIR");  // NOLINT(concurrency-mt-unsafe): nobody sets it
  path_ = std::string(folder != nullptr ? folder : "/tmp") + "/attr_engine_XXXXXX";
  fd_ = ::mkstemp(path_.data());
  CHECK(fd_ >= 0);
}
File::File(const Bytes& content) : File() { Write(content); }
File::~File() {
  ::close(fd_);
  ::unlink(path_.c_str());
}
void File::Write(const Bytes& content) const {
  Truncate(static_cast<int64_t>(content.size()));
  CHECK(::pwrite(fd_, content.data(), content.size(), 0) == static_cast<ssize_t>(content.size()));
}
void File::Truncate(int64_t size) const { CHECK(::ftruncate(fd_, size) == 0); }

Bytes ShardBytes(const std::vector<Tensor>& tensors, size_t spaces) {
  std::string header = R"({"__metadata__":{"attr_engine":"{\"format\":\"test\"}"})";
  int64_t reached = 0;
  for (const Tensor& tensor : tensors) {
    header += "," + Json(tensor, reached);
    reached += static_cast<int64_t>(tensor.data.size());
  }
  header += "}" + std::string(spaces, ' ');
  Bytes file(8);
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<uint8_t>(header.size() >> (8 * i));
  file.insert(file.end(), header.begin(), header.end());
  for (const Tensor& tensor : tensors) file.insert(file.end(), tensor.data.begin(), tensor.data.end());
  return file;
}

Bytes RandomItems(Random& random, const std::string& dtype, int64_t items, Floats floats) {
  const auto size = static_cast<size_t>(ItemBytes(dtype));
  Bytes bytes(static_cast<size_t>(items) * size);
  const std::optional<DType> is_float = FloatType(dtype);
  if (!is_float || floats == Floats::kAny) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    return bytes;
  }
  for (size_t i = 0; i < bytes.size(); i += size) {
    // Up to 2^15, and far enough down that halves become subnormal or zero.
    const double value =
        std::ldexp(static_cast<double>(static_cast<int64_t>(random())), static_cast<int>(random() % 50) - 97);
    const uint64_t bits = Encode(value, *is_float);
    for (size_t k = 0; k < size; ++k) bytes[i + k] = static_cast<uint8_t>(bits >> (8 * k));
  }
  return bytes;
}

DataSet::DataSet(Random& random, bool wide, Floats floats) {
  constexpr std::array<const char*, 4> kFloats = {"F16", "BF16", "F32", "F64"};
  const std::array<TensorSpec, 4> specs = {{
      {"latents", kFloats[random() % 4], wide ? Pick(random, 500, 2000) : Pick(random, 1, 40)},
      {"conditioning.tokens", "I64", Pick(random, 1, 5)},
      {"conditioning.clap", kFloats[random() % 4], Pick(random, 1, 300)},
      {"offsets", "U8", 1},
  }};
  const int64_t longest = wide ? 45 : Pick(random, 1, 150);
  const int64_t vector_rows = Pick(random, 1, 3);
  for (int64_t s = Pick(random, 1, 4); s > 0; --s) {
    std::vector<int64_t> reached(specs.size(), 0);
    for (int64_t t = Pick(random, 1, wide ? 6 : 25); t > 0; --t) {
      const std::vector<int64_t> rows = {OneIn(random, 8) ? 0 : Pick(random, 1, longest),
                                         OneIn(random, 3) ? 0 : Pick(random, 1, 20), vector_rows, 1};
      tracks.push_back({static_cast<int32_t>(shards.size()), reached, rows});
      for (size_t i = 0; i < rows.size(); ++i) reached[i] += rows[i];
    }
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < specs.size(); ++i) {
      const TensorSpec& spec = specs[i];
      Bytes data = RandomItems(random, spec.dtype, reached[i] * spec.row_items, floats);
      tensors.push_back({spec, {reached[i], spec.row_items}, std::move(data)});
    }
    const Bytes content = ShardBytes(tensors, static_cast<size_t>(Pick(random, 0, 70)));
    files.push_back(std::make_unique<File>(content));
    sizes.push_back(static_cast<int64_t>(content.size()));
    shards.push_back(std::move(tensors));
  }
}

std::vector<TensorSpec> DataSet::Specs() const {
  std::vector<TensorSpec> specs;
  for (const Tensor& tensor : shards[0]) specs.push_back(tensor.spec);
  return specs;
}

std::shared_ptr<ShardSet> DataSet::Open(bool map, ReadFunction read) const {
  std::vector<ShardSpec> specs;
  for (size_t i = 0; i < files.size(); ++i) specs.push_back({files[i]->path(), sizes[i]});
  return std::make_shared<ShardSet>(std::move(specs), Specs(), map, read);
}

const uint8_t* DataSet::Row(size_t tensor, int32_t shard, int64_t row) const {
  const Tensor& from = shards[static_cast<size_t>(shard)][tensor];
  return from.data.data() + row * from.spec.row_items * ItemBytes(from.spec.dtype);
}

Job::Job(Random& random, const DataSet& set, size_t slots, Floats floats) : data(set) {
  std::vector<size_t> order(data.tracks.size());
  std::iota(order.begin(), order.end(), 0);
  const int64_t kind = Pick(random, 0, 3);
  if (kind == 1) std::shuffle(order.begin(), order.end(), random);
  if (kind == 2) {  // with doubles
    for (size_t& track : order) track = random() % data.tracks.size();
  }
  if (kind == 3) order.resize(random() % (order.size() + 1));
  for (const size_t track : order) plan.shards.push_back(data.tracks[track].shard);
  const int64_t most = Pick(random, 1, 9);
  for (int64_t reached = 0; reached < static_cast<int64_t>(order.size());) {
    reached = std::min(reached + (OneIn(random, 4) ? Pick(random, 1, most) : most),
                       static_cast<int64_t>(order.size()));
    plan.ends.push_back(reached);
  }

  constexpr std::array<DType, 4> kTypes = {DType::kF16, DType::kBF16, DType::kF32, DType::kF64};
  const bool checked = !OneIn(random, 4);
  const bool fixed = OneIn(random, 2);
  const std::vector<TensorSpec> specs = data.Specs();
  for (size_t i = 0; i < specs.size(); ++i) {
    Field field;
    field.tensor = i;
    const std::optional<DType> stored = FloatType(specs[i].dtype);
    // A NaN may change its bits in a cast, so any floats go through as they are.
    if (stored && floats == Floats::kModest && !OneIn(random, 3)) field.to = kTypes[random() % 4];
    const auto type_size = field.to ? static_cast<int64_t>(SizeOf(*field.to)) : ItemBytes(specs[i].dtype);
    const int64_t row_out = type_size * specs[i].row_items;
    const auto row_in = static_cast<size_t>(specs[i].row_items * ItemBytes(specs[i].dtype));
    field.refuse_nonfinite = stored && floats == Floats::kModest && OneIn(random, 2);
    if (OneIn(random, 2)) field.pad_row = RandomItems(random, "U8", row_out, Floats::kAny);
    for (const size_t track : order) {
      const DataSet::Track& from = data.tracks[track];
      field.starts.push_back(from.start[i]);
      field.rows.push_back(from.rows[i]);
      if (checked) {
        field.checksums.push_back(Crc32cPortable(data.Row(i, from.shard, from.start[i]),
                                                 static_cast<size_t>(from.rows[i]) * row_in));
      }
    }
    const int64_t longest = field.rows.empty() ? 0 : *std::max_element(field.rows.begin(), field.rows.end());
    int64_t block = 0;
    for (int64_t b = 0; b < batches(); ++b) {
      const auto first = field.rows.begin() + First(b);
      const auto last = field.rows.begin() + plan.ends[static_cast<size_t>(b)];
      field.frames.push_back(fixed ? longest : *std::max_element(first, last));
      block = std::max(block, (last - first) * field.frames.back() * row_out);
    }
    slot_bytes += static_cast<size_t>(OneIn(random, 3) ? Pick(random, 0, 50) : 0);  // any alignment
    field.slot_offset = slot_bytes;
    slot_bytes += static_cast<size_t>(block);
    plan.fields.push_back(std::move(field));
  }
  slot_bytes = std::max<size_t>(slot_bytes, 1);
  memory.assign(slots * slot_bytes, 0xEE);
}

std::shared_ptr<Ring> Job::MakeRing() {
  return std::make_shared<Ring>(memory.data(), memory.size(), slot_bytes);
}

Bytes Job::Expected(size_t number, int64_t batch) const {
  const Field& field = plan.fields[number];
  const TensorSpec spec = data.shards[0][field.tensor].spec;
  const std::optional<DType> stored = FloatType(spec.dtype);
  const auto item = static_cast<size_t>(ItemBytes(spec.dtype));
  const size_t item_out = field.to ? SizeOf(*field.to) : item;
  const auto row_items = static_cast<size_t>(spec.row_items);
  Bytes row(row_items * item_out);
  Bytes out;
  for (int64_t i = First(batch); i < plan.ends[static_cast<size_t>(batch)]; ++i) {
    const auto track = static_cast<size_t>(i);
    for (int64_t frame = 0; frame < field.frames[static_cast<size_t>(batch)]; ++frame) {
      if (frame >= field.rows[track]) {
        row = field.pad_row.empty() ? Bytes(row.size(), 0) : field.pad_row;
      } else {
        const uint8_t* from = data.Row(field.tensor, plan.shards[track], field.starts[track] + frame);
        for (size_t k = 0; k < row_items; ++k) {
          if (field.to && field.to != stored) {
            SlowCast(row.data() + k * item_out, *field.to, from + k * item, *stored);
          } else {
            std::memcpy(row.data() + k * item, from + k * item, item);
          }
        }
      }
      out.insert(out.end(), row.begin(), row.end());
    }
  }
  return out;
}

bool Job::IsRight(const uint8_t* slot, int64_t batch) const {
  for (size_t f = 0; f < plan.fields.size(); ++f) {
    const Bytes expected = Expected(f, batch);
    if (!std::equal(expected.begin(), expected.end(), slot + plan.fields[f].slot_offset)) return false;
  }
  return true;
}

Stream::Result Await(Stream& stream) {
  for (;;) {
    const Stream::Result result = stream.Next(50);
    if (result.state == Stream::State::kBatch || result.state == Stream::State::kEnd) return result;
  }
}

std::optional<ReadError> Failure(Stream& stream, Ring& ring, int64_t* delivered) {
  int64_t count = 0;
  try {
    for (;;) {
      const Stream::Result result = Await(stream);
      if (result.state == Stream::State::kEnd) return std::nullopt;
      ++count;
      ring.Release(result.slot, false);
    }
  } catch (const ReadError& error) {
    if (delivered != nullptr) *delivered = count;
    return error;
  }
}

void SlowCast(uint8_t* out, DType to, const uint8_t* in, DType from) {
  double value = Value(in, from);
  if (from == DType::kF64 && SizeOf(to) == 2) value = static_cast<double>(static_cast<float>(value));
  const uint64_t bits = Encode(value, to);
  for (size_t i = 0; i < SizeOf(to); ++i) out[i] = static_cast<uint8_t>(bits >> (8 * i));
}

}  // namespace attr_engine::test
