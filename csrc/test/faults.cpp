// Damaged files, failing reads and hostile numbers: an error that says where, in plan order, and never a
// signal.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "crc32c.h"
#include "header.h"
#include "support.h"

namespace attr_engine::test {
namespace {

using Kind = ReadError::Kind;

// A read that is interrupted now and then and returns fewer bytes than asked for.
ssize_t InterruptedRead(int fd, void* buffer, size_t size, off_t offset) {
  thread_local Random random(1);
  if (OneIn(random, 3)) {
    errno = EINTR;
    return -1;
  }
  const int64_t most = OneIn(random, 2) ? 5000 : 500000;
  return ::pread(fd, buffer, std::min(size, static_cast<size_t>(Pick(random, 1, most))), offset);
}

ssize_t BrokenRead(int /*fd*/, void* /*buffer*/, size_t /*size*/, off_t /*offset*/) {
  errno = EIO;
  return -1;
}

// Reads that reach this byte of a file fail with EIO, or find that the file ends there.
std::atomic<int64_t> edge{std::numeric_limits<int64_t>::max()};
std::atomic<bool> ends_there{false};
ssize_t EdgeRead(int fd, void* buffer, size_t size, off_t offset) {
  if (offset >= edge) {
    if (ends_there) return 0;
    errno = EIO;
    return -1;
  }
  return ::pread(fd, buffer, std::min(size, static_cast<size_t>(edge - offset)), offset);
}

void CheckInterrupted(Random& random) {
  for (int round = 0; round < 15; ++round) {
    const DataSet data(random, OneIn(random, 4), Floats::kModest);
    Job job(random, data, 2, Floats::kModest);
    const std::shared_ptr<Ring> ring = job.MakeRing();
    Stream stream(data.Open(false, InterruptedRead), job.plan, ring, random() % 3, 0);
    for (int64_t batch = 0; batch < job.batches(); ++batch) {
      const Stream::Result result = Await(stream);
      CHECK(result.state == Stream::State::kBatch && job.IsRight(ring->slot(result.slot), batch));
      ring->Release(result.slot, false);
    }
  }
}

// The error of the first track, in plan order, that reads past `edge` comes after all batches before it, for
// any number of threads, and again at every further call.
void CheckOrder(Random& random) {
  for (int round = 0; round < 40; ++round) {
    const DataSet data(random, OneIn(random, 4), Floats::kModest);
    Job job(random, data, static_cast<size_t>(Pick(random, 1, 4)), Floats::kModest);
    const int64_t largest = *std::max_element(data.sizes.begin(), data.sizes.end());
    const auto shard = static_cast<size_t>(Pick(random, 0, static_cast<int64_t>(data.files.size()) - 1));
    Bytes head(8);
    int64_t header = 8;
    {
      std::FILE* file = std::fopen(data.files[shard]->path().c_str(), "rb");
      CHECK(file != nullptr && std::fread(head.data(), 1, 8, file) == 8);
      (void)std::fclose(file);
      for (size_t i = 0; i < 8; ++i) header += int64_t{head[i]} << (8 * i);
    }
    edge = Pick(random, header, largest);
    ends_there = OneIn(random, 2);
    int64_t expected = ReadError::kNone;
    for (int64_t i = 0; i < static_cast<int64_t>(job.plan.shards.size()) && expected < 0; ++i) {
      const auto track = static_cast<size_t>(i);
      const auto& tensors = data.shards[static_cast<size_t>(job.plan.shards[track])];
      int64_t begin = data.sizes[static_cast<size_t>(job.plan.shards[track])];
      for (const Tensor& tensor : tensors) begin -= static_cast<int64_t>(tensor.data.size());
      if (begin > edge) expected = i;  // the header itself cannot be read
      for (size_t f = 0; f < job.plan.fields.size(); ++f) {
        const Field& field = job.plan.fields[f];
        const int64_t row = tensors[f].spec.row_items * ItemBytes(tensors[f].spec.dtype);
        const int64_t end = begin + (field.starts[track] + field.rows[track]) * row;
        if (field.rows[track] > 0 && end > edge) expected = i;
        begin += static_cast<int64_t>(tensors[f].data.size());
      }
    }
    const std::shared_ptr<Ring> ring = job.MakeRing();
    Stream stream(data.Open(false, EdgeRead), job.plan, ring, random() % 5, 0);
    int64_t delivered = 0;
    const auto error = Failure(stream, *ring, &delivered);
    CHECK(error.has_value() == (expected >= 0));
    if (!error) continue;
    CHECK(error->kind() == (ends_there ? Kind::kTruncated : Kind::kUnreadable));
    CHECK(error->shard() == job.plan.shards[static_cast<size_t>(expected)]);
    CHECK(error->track() == expected || error->track() == ReadError::kNone);
    CHECK(job.First(delivered) <= expected && expected < job.plan.ends[static_cast<size_t>(delivered)]);
    const auto again = Failure(stream, *ring);
    CHECK(again && std::strcmp(again->what(), error->what()) == 0);
  }
}

// One wrong checksum, or one NaN, among small tracks that are read together.
void CheckDamage(Random& random) {
  for (int round = 0; round < 40; ++round) {
    const DataSet data(random, false, Floats::kModest);
    Job job(random, data, 2, Floats::kModest);
    const auto tracks = static_cast<int64_t>(job.plan.shards.size());
    if (tracks == 0 || job.plan.fields[0].checksums.empty()) continue;
    const auto at = static_cast<size_t>(Pick(random, 0, tracks - 1));
    const size_t f = random() % job.plan.fields.size();
    job.plan.fields[f].checksums[at] ^= 1U << random() % 32;
    const std::shared_ptr<Ring> ring = job.MakeRing();
    Stream stream(data.Open(OneIn(random, 2)), job.plan, ring, random() % 4, 0);
    const auto error = Failure(stream, *ring);
    CHECK(error && error->kind() == Kind::kChecksum && error->track() == static_cast<int64_t>(at));
    CHECK(std::strstr(error->what(), "but 0x") != nullptr);
  }
}

// A track that leads out of its tensor, into the next one or out of the file.
void CheckOutside(Random& random) {
  for (int round = 0; round < 40; ++round) {
    const DataSet data(random, false, Floats::kModest);
    Job job(random, data, 2, Floats::kModest);
    if (job.plan.shards.empty()) continue;
    const size_t at = random() % job.plan.shards.size();
    const size_t f = random() % job.plan.fields.size();
    Field& field = job.plan.fields[f];
    for (Field& other : job.plan.fields) {
      other.checksums.clear();
      other.refuse_nonfinite = false;
    }
    const int64_t held = data.shards[static_cast<size_t>(job.plan.shards[at])][f].shape[0];
    field.starts[at] = held - field.rows[at] + Pick(random, 1, 3);
    const std::shared_ptr<Ring> ring = job.MakeRing();
    Stream stream(data.Open(OneIn(random, 2)), job.plan, ring, random() % 4, 0);
    const auto error = Failure(stream, *ring);
    CHECK(error && error->kind() == Kind::kMismatch && error->track() == static_cast<int64_t>(at));
  }
}

void CheckNonFinite(Random& random) {
  for (int round = 0; round < 30; ++round) {
    DataSet data(random, false, Floats::kModest);
    Job job(random, data, 2, Floats::kModest);
    const size_t f = OneIn(random, 2) ? 0 : 2;
    Field& field = job.plan.fields[f];
    field.refuse_nonfinite = true;
    field.checksums.clear();
    const auto& spec = data.shards[0][f].spec;
    const auto item = static_cast<size_t>(ItemBytes(spec.dtype));
    // The tensors of random tracks, in plan order the first of which is to be named.
    std::vector<std::pair<int32_t, int64_t>> bad;
    for (int n = 0; n < 2 && !field.rows.empty(); ++n) {
      const auto at = random() % field.rows.size();
      if (field.rows[at] == 0) continue;
      const int32_t shard = job.plan.shards[at];
      const int64_t row = field.starts[at] + Pick(random, 0, field.rows[at] - 1);
      Tensor& tensor = data.shards[static_cast<size_t>(shard)][f];
      const int64_t index = row * spec.row_items + Pick(random, 0, spec.row_items - 1);
      Bytes nan(8);
      const double value = OneIn(random, 2) ? HUGE_VAL : std::nan("");
      std::memcpy(nan.data(), &value, sizeof value);
      SlowCast(tensor.data.data() + static_cast<size_t>(index) * item, *FloatType(spec.dtype), nan.data(),
               DType::kF64);
      bad.emplace_back(shard, row);
      const Bytes content = ShardBytes(data.shards[static_cast<size_t>(shard)], 0);
      data.files[static_cast<size_t>(shard)]->Write(content);
      data.sizes[static_cast<size_t>(shard)] = static_cast<int64_t>(content.size());
    }
    int64_t expected = ReadError::kNone;
    for (size_t i = 0; i < field.rows.size() && expected < 0; ++i) {
      for (const auto& [shard, row] : bad) {
        const bool inside = field.starts[i] <= row && row < field.starts[i] + field.rows[i];
        if (shard == job.plan.shards[i] && inside) expected = static_cast<int64_t>(i);
      }
    }
    for (Field& other : job.plan.fields) other.checksums.clear();
    const std::shared_ptr<Ring> ring = job.MakeRing();
    Stream stream(data.Open(OneIn(random, 2)), job.plan, ring, random() % 4, 0);
    const auto error = Failure(stream, *ring);
    CHECK(error.has_value() == (expected >= 0));
    if (error) CHECK(error->kind() == Kind::kNonFinite && error->track() == expected);
  }
}

// Files that are cut, and grow again, while they are read and mapped.
void CheckShrinking(Random& random) {
  for (int round = 0; round < 30; ++round) {
    const DataSet data(random, OneIn(random, 2), Floats::kModest);
    Job job(random, data, 2, Floats::kModest);
    for (Field& field : job.plan.fields) field.refuse_nonfinite = false;
    const std::shared_ptr<ShardSet> shards = data.Open(OneIn(random, 4) ? false : true);
    for (size_t i = 0; i < shards->size(); ++i) (void)shards->Open(i);
    std::atomic<bool> done{false};
    std::thread cutter([&, own = Random(random())]() mutable {
      while (!done) {
        const size_t which = own() % data.files.size();
        data.files[which]->Truncate(Pick(own, 0, data.sizes[which]));
        if (OneIn(own, 2)) data.files[which]->Truncate(data.sizes[which]);
      }
    });
    for (int pass = 0; pass < 10; ++pass) {
      const std::shared_ptr<Ring> ring = job.MakeRing();
      Stream stream(shards, job.plan, ring, random() % 3, 0);
      const auto error = Failure(stream, *ring);
      if (error) CHECK(error->kind() == Kind::kTruncated || error->kind() == Kind::kChecksum);
    }
    done = true;
    cutter.join();
    for (size_t i = 0; i < shards->size(); ++i) data.files[i]->Truncate(0);
    const std::shared_ptr<Ring> ring = job.MakeRing();
    Stream stream(shards, job.plan, ring, 2, 0);
    const auto error = Failure(stream, *ring);
    if (error) CHECK(error->kind() == Kind::kTruncated);
  }
}

void CheckUnopenable(Random& random) {
  const DataSet data(random, false, Floats::kModest);
  const std::vector<TensorSpec> specs = data.Specs();
  const auto kind = [&](const std::string& path, int64_t bytes, std::vector<TensorSpec> tensors,
                        ReadFunction read = ::pread) {
    ShardSet set({{path, bytes}}, std::move(tensors), OneIn(random, 2), read);
    try {
      (void)set.Open(0);
    } catch (const ReadError& error) {
      CHECK(error.shard() == 0 && error.track() == ReadError::kNone);
      return error.kind();
    }
    return Kind::kStarved;  // which opening never gives
  };
  const std::string path = data.files[0]->path();
  const int64_t bytes = data.sizes[0];
  CHECK(kind(path, bytes, specs) == Kind::kStarved);
  CHECK(kind(path + ".none", bytes, specs) == Kind::kMissing);
  CHECK(kind("/tmp", bytes, specs) == Kind::kUnreadable);
  CHECK(kind("/dev/null", 0, specs) == Kind::kUnreadable);
  CHECK(kind(path, bytes + 1, specs) == Kind::kTruncated);
  CHECK(kind(path, bytes - 1, specs) == Kind::kMismatch);
  CHECK(kind(path, -1, specs) == Kind::kMismatch);
  CHECK(kind(path, bytes, specs, BrokenRead) == Kind::kUnreadable);
  CHECK(kind(path, bytes, {{"none", "F32", 1}}) == Kind::kMismatch);
  CHECK(kind(path, bytes, {{"offsets", "I8", 1}}) == Kind::kMismatch);
  CHECK(kind(path, bytes, {{"offsets", "U8", 1 << 30}}) == Kind::kMismatch);
  CHECK(kind(path, bytes, {{"offsets", "U8", std::numeric_limits<int64_t>::max()}}) == Kind::kMismatch);
  const std::string link = path + ".link";
  CHECK(::symlink(path.c_str(), link.c_str()) == 0);
  CHECK(kind(link, bytes, specs) == Kind::kUnreadable);
  CHECK(::unlink(link.c_str()) == 0);
  for (const TensorSpec& wrong : {TensorSpec{"x", "F32", 0}, {"x", "F32", -1}, {"x", "F33", 1}}) {
    try {
      const ShardSet set({}, {wrong}, false);
      CHECK(false);
    } catch (const ReadError& error) {
      CHECK(error.kind() == Kind::kArgument);
    }
  }
}

// Replaces one number by one that a careless program trips over.
template <typename T>
void Spoil(Random& random, T& number) {
  constexpr std::array<int64_t, 13> kNasty = {std::numeric_limits<int64_t>::min(),
                                              -1,
                                              0,
                                              1,
                                              2,
                                              255,
                                              int64_t{1} << 31,
                                              (int64_t{1} << 31) - 1,
                                              int64_t{1} << 32,
                                              int64_t{1} << 61,
                                              int64_t{1} << 62,
                                              std::numeric_limits<int64_t>::max() - 1,
                                              std::numeric_limits<int64_t>::max()};
  const size_t choice = random() % (kNasty.size() + 2);
  const auto near = static_cast<uint64_t>(number) + (choice % 2 == 0 ? 1 : ~uint64_t{0});
  number = static_cast<T>(choice < kNasty.size() ? static_cast<uint64_t>(kNasty[choice]) : near);
}

template <typename T>
void SpoilOne(Random& random, std::vector<T>& list) {
  if (!list.empty() && !OneIn(random, 6)) {
    Spoil(random, list[random() % list.size()]);
  } else if (OneIn(random, 2) && !list.empty()) {
    list.pop_back();
  } else {
    list.push_back(0);
  }
}

}  // namespace

void CheckFaults(Random& random) {
  CheckInterrupted(random);
  CheckOrder(random);
  CheckDamage(random);
  CheckOutside(random);
  CheckNonFinite(random);
  CheckShrinking(random);
  CheckUnopenable(random);
}

// Any mixture of hostile numbers is refused or served, and never touches memory that is not there.
void CheckHostile(Random& random) {
  for (int round = 0; round < 60; ++round) {
    const DataSet data(random, false, Floats::kModest);
    for (int turn = 0; turn < 40; ++turn) {
      Job job(random, data, static_cast<size_t>(Pick(random, 1, 3)), Floats::kModest);
      std::vector<TensorSpec> specs = data.Specs();
      std::vector<ShardSpec> files;
      for (size_t i = 0; i < data.files.size(); ++i) files.push_back({data.files[i]->path(), data.sizes[i]});
      Plan& plan = job.plan;
      int64_t first = 0;
      for (int64_t changes = Pick(random, 1, 3); changes > 0; --changes) {
        Field& field = plan.fields[random() % plan.fields.size()];
        switch (Pick(random, 0, 12)) {
          case 0:
            SpoilOne(random, plan.shards);
            break;
          case 1:
            SpoilOne(random, plan.ends);
            break;
          case 2:
            SpoilOne(random, field.starts);
            break;
          case 3:
            SpoilOne(random, field.rows);
            break;
          case 4:
            SpoilOne(random, field.frames);
            break;
          case 5:
            field.checksums.clear();
            break;
          case 6:
            SpoilOne(random, field.pad_row);
            break;
          case 7:
            Spoil(random, field.slot_offset);
            break;
          case 8:
            Spoil(random, field.tensor);
            break;
          case 9:
            field.to = DType::kF64;
            break;
          case 10:
            Spoil(random, specs[random() % specs.size()].row_items);
            break;
          case 11:
            Spoil(random, files[random() % files.size()].bytes);
            break;
          default:
            Spoil(random, first);
            break;
        }
      }
      try {
        auto shards = std::make_shared<ShardSet>(files, specs, OneIn(random, 2));
        const std::shared_ptr<Ring> ring = job.MakeRing();
        Stream stream(std::move(shards), plan, ring, OneIn(random, 8) ? 2 : 0, first);
        (void)Failure(stream, *ring);
      } catch (const ReadError& error) {
        CHECK(error.kind() == Kind::kArgument);
      }
    }
  }
  Bytes memory(100);
  for (const auto& [bytes, slot] : {std::pair<size_t, size_t>{100, 0}, {100, 101}, {100, 33}, {0, 1}}) {
    try {
      const Ring ring(memory.data(), bytes, slot);
      CHECK(false);
    } catch (const ReadError& error) {
      CHECK(error.kind() == Kind::kArgument);
    }
  }
}

}  // namespace attr_engine::test
