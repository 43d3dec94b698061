// Standalone checks of csrc without Python, to be built with a sanitizer (`make sanitize`):
//   g++ -std=c++17 -g -O1 -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined -pthread -Icsrc
//       csrc/crc32c.cpp csrc/gather.cpp csrc/test/driver.cpp -o driver && ./driver 1
// The argument is the seed. Prints "ok" and exits 0, or says which check failed and exits 1.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "crc32c.h"
#include "gather.h"

namespace {

using attr_engine::Crc32c;
using attr_engine::Crc32cPortable;
using attr_engine::Gather;
using attr_engine::GatherError;
using attr_engine::GatherRequest;
using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

int64_t Pick(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

Bytes RandomBytes(Random& random, size_t size) {
  Bytes bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

// A temporary file without a name.
class File {
 public:
  explicit File(const Bytes& content) : stream_(std::tmpfile()) {
    CHECK(stream_ != nullptr);
    CHECK(::pwrite(fd(), content.data(), content.size(), 0) == static_cast<ssize_t>(content.size()));
  }
  ~File() { std::fclose(stream_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return ::fileno(stream_); }
  void Truncate(size_t size) const { CHECK(::ftruncate(fd(), static_cast<off_t>(size)) == 0); }

 private:
  std::FILE* stream_;
};

// A file of random rows and a request for random tracks of it, with all that the request points to. The
// buffers are exactly as long as needed, so that the address sanitizer sees the first byte beyond.
struct Case {
  explicit Case(Random& random) {
    request.row_bytes = Pick(random, 1, 150);
    request.data_offset = Pick(random, 0, 5000);
    request.frames = Pick(random, 1, 500);
    const int64_t rows = Pick(random, 0, 1500);
    content = RandomBytes(random, static_cast<size_t>(request.data_offset + rows * request.row_bytes));
    file = std::make_unique<File>(content);
    request.fd = file->fd();

    const int64_t tracks = Pick(random, 0, 8);
    request.checksums.emplace();
    for (int64_t i = 0; i < tracks; ++i) {
      const int64_t length = Pick(random, 0, std::min(rows, request.frames));
      const int64_t start = Pick(random, 0, rows - length);
      request.lengths.push_back(length);
      request.starts.push_back(start);
      request.checksums->push_back(
          Crc32cPortable(Source(start), static_cast<size_t>(length * request.row_bytes)));
    }
    out = Bytes(static_cast<size_t>(tracks * request.frames * request.row_bytes), 0xEE);
    request.out = out.data();
    request.out_bytes = out.size();
    if (Pick(random, 0, 1) == 1) {
      pad_row = RandomBytes(random, static_cast<size_t>(request.row_bytes));
      request.pad_row = pad_row.data();
    }
    if (Pick(random, 0, 3) == 0) request.checksums.reset();
  }

  const uint8_t* Source(int64_t row) const {
    return content.data() + request.data_offset + row * request.row_bytes;
  }

  // The batch, built row by row from the content.
  Bytes Expected() const {
    Bytes batch;
    batch.reserve(out.size());
    const Bytes zeros(static_cast<size_t>(request.row_bytes), 0);
    for (size_t i = 0; i < request.starts.size(); ++i) {
      for (int64_t row = 0; row < request.frames; ++row) {
        const uint8_t* padding = request.pad_row != nullptr ? request.pad_row : zeros.data();
        const uint8_t* from = row < request.lengths[i] ? Source(request.starts[i] + row) : padding;
        batch.insert(batch.end(), from, from + request.row_bytes);
      }
    }
    return batch;
  }

  GatherRequest request;
  Bytes content;
  Bytes out;
  Bytes pad_row;
  std::unique_ptr<File> file;
};

// Runs Gather and returns what it threw, if anything.
std::optional<GatherError> Failure(const GatherRequest& request, attr_engine::ReadFunction read = ::pread) {
  try {
    Gather(request, read);
  } catch (const GatherError& error) {
    return error;
  }
  return std::nullopt;
}

// A read that is interrupted now and then and returns fewer bytes than asked for.
thread_local uint64_t fault_state = 1;
ssize_t FaultyRead(int fd, void* buffer, size_t size, off_t offset) {
  fault_state = fault_state * 6364136223846793005U + 1442695040888963407U;
  const uint64_t draw = fault_state >> 33;
  if (draw % 3 == 0) {
    errno = EINTR;
    return -1;
  }
  return ::pread(fd, buffer, std::min<size_t>(size, 1 + draw % 5000), offset);
}

ssize_t BrokenRead(int, void*, size_t, off_t) {
  errno = EIO;
  return -1;
}

void TestChecksum(Random& random) {
  CHECK(Crc32c("123456789", 9) == 0xE3069283U);  // the check value of RFC 3720
  CHECK(Crc32c(nullptr, 0) == 0);
  const Bytes zeros(32, 0);
  CHECK(Crc32c(zeros.data(), zeros.size()) == 0x8A9136AAU);
  for (int round = 0; round < 300; ++round) {
    const auto size = static_cast<size_t>(Pick(random, 0, 20000));
    const auto skip = static_cast<size_t>(Pick(random, 0, 9));
    const Bytes bytes = RandomBytes(random, skip + size);
    const uint8_t* data = bytes.data() + skip;  // any alignment
    const uint32_t whole = Crc32c(data, size);
    CHECK(whole == Crc32cPortable(data, size));
    const auto cut = static_cast<size_t>(Pick(random, 0, static_cast<int64_t>(size)));
    CHECK(whole == Crc32c(data + cut, size - cut, Crc32c(data, cut)));
  }
}

void TestGather(Random& random) {
  for (int round = 0; round < 60; ++round) {
    Case test(random);
    const Bytes expected = test.Expected();
    CHECK(!Failure(test.request));
    CHECK(test.out == expected);
    std::fill(test.out.begin(), test.out.end(), uint8_t{0xEE});
    CHECK(!Failure(test.request, FaultyRead));
    CHECK(test.out == expected);
  }
}

// Returns a case in which some track has bytes, and the index of the first such track.
std::pair<std::unique_ptr<Case>, size_t> NonEmpty(Random& random) {
  for (;;) {
    auto test = std::make_unique<Case>(random);
    for (size_t i = 0; i < test->request.lengths.size(); ++i) {
      if (test->request.lengths[i] > 0) return {std::move(test), i};
    }
  }
}

void TestFailures(Random& random) {
  for (int round = 0; round < 40; ++round) {
    auto [test, first] = NonEmpty(random);
    const GatherRequest& request = test->request;

    auto error = Failure(request, BrokenRead);
    CHECK(error && error->kind() == GatherError::Kind::kRead && error->track() == first);
    CHECK(error->error_number() == EIO);
    CHECK(std::string(error->what()).rfind("track " + std::to_string(first) + ": ", 0) == 0);

    GatherRequest damaged = request;
    damaged.checksums.emplace();
    for (size_t i = 0; i < request.starts.size(); ++i) {
      const auto size = static_cast<size_t>(request.lengths[i] * request.row_bytes);
      damaged.checksums->push_back(Crc32c(test->Source(request.starts[i]), size) ^ (i == first ? 1U : 0U));
    }
    error = Failure(damaged);
    CHECK(error && error->kind() == GatherError::Kind::kChecksum && error->track() == first);

    test->file->Truncate(test->content.size() - 1);  // the last row is no longer whole
    const int64_t rows =
        (static_cast<int64_t>(test->content.size()) - request.data_offset) / request.row_bytes;
    GatherRequest beyond = request;
    beyond.starts[first] = rows - request.lengths[first];
    size_t outside = 0;  // an empty track before `first` may lie at the old end
    while (beyond.starts[outside] + beyond.lengths[outside] < rows) ++outside;
    error = Failure(beyond);
    CHECK(error && error->kind() == GatherError::Kind::kArgument && error->track() == outside);
  }
}

// A file that shrinks after its size was checked.
const File* shrinking = nullptr;
ssize_t ShrinkingRead(int fd, void* buffer, size_t size, off_t offset) {
  shrinking->Truncate(static_cast<size_t>(offset) + size / 2);
  return ::pread(fd, buffer, size, offset);
}

void TestShrinkingFile(Random& random) {
  auto [test, first] = NonEmpty(random);
  shrinking = test->file.get();
  const auto error = Failure(test->request, ShrinkingRead);
  CHECK(error && error->kind() == GatherError::Kind::kRead && error->track() == first);
  CHECK(std::strstr(error->what(), "became shorter") != nullptr);
}

// Any mixture of hostile numbers is refused or served, and never touches memory that is not there.
void TestHostileNumbers(Random& random) {
  const std::vector<int64_t> nasty = {kMin, -1, 0, 1, 2, int64_t{1} << 31, int64_t{1} << 32, kMax / 2, kMax};
  const auto replace = [&](int64_t& number) {
    const auto choice = static_cast<size_t>(Pick(random, 0, 2 * static_cast<int64_t>(nasty.size())));
    if (choice < nasty.size()) {
      number = nasty[choice];
    } else if (number < kMax) {
      number += 1;
    }
  };
  for (int round = 0; round < 400; ++round) {
    auto [test, first] = NonEmpty(random);
    GatherRequest request = test->request;
    request.checksums.reset();
    for (int64_t changes = Pick(random, 1, 2); changes > 0; --changes) {
      switch (Pick(random, 0, 7)) {
        case 0:
          replace(request.data_offset);
          break;
        case 1:
          replace(request.row_bytes);
          request.pad_row = nullptr;  // its size is the caller's promise
          break;
        case 2:
          replace(request.frames);
          break;
        case 3:
          replace(request.starts[first]);
          break;
        case 4:
          request.lengths[first] = request.frames;  // so that one more is one too many
          replace(request.lengths[first]);
          break;
        case 5:
          request.lengths.push_back(0);
          break;
        case 6:
          request.starts.push_back(0);
          break;
        default:
          request.fd = Pick(random, 0, 1) == 1 ? -1 : 1 << 20;
          break;
      }
    }
    (void)Failure(request);
  }
}

void TestThreads(Random& random) {
  for (int round = 0; round < 5; ++round) {
    const auto test = NonEmpty(random).first;
    const Bytes expected = test->Expected();
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        GatherRequest request = test->request;
        Bytes out(expected.size());
        request.out = out.data();
        for (int call = 0; call < 6; ++call) {
          if (Failure(request, call % 2 == 0 ? ::pread : FaultyRead) || out != expected) ++wrong;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
  }
}

void TestTruncationRace(Random& random) {
  auto [test, first] = NonEmpty(random);
  std::atomic<bool> done{false};
  std::thread writer([&, file = test->file.get(), size = test->content.size()] {
    while (!done) {
      file->Truncate(size / 2);
      file->Truncate(size);
    }
  });
  for (int round = 0; round < 200; ++round) (void)Failure(test->request);  // an error or not, never a signal
  done = true;
  writer.join();
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  Random random(seed);
  try {
    TestChecksum(random);
    TestGather(random);
    TestFailures(random);
    TestShrinkingFile(random);
    TestHostileNumbers(random);
    TestThreads(random);
    TestTruncationRace(random);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "seed %s: unexpected exception: %s\n", std::to_string(seed).c_str(), error.what());
    return 1;
  }
  std::printf("ok (seed %s, crc32c by %s)\n", std::to_string(seed).c_str(),
              attr_engine::Crc32cImplementation());
  return 0;
}
