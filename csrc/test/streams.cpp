// Streams of undamaged data sets: every batch, by however many threads, is what the slow gather gives.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <filesystem>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "support.h"

namespace attr_engine::test {
namespace {

using State = Stream::State;

size_t OpenFiles() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(files), end(files)));
}

size_t Threads() {
  const std::filesystem::directory_iterator threads("/proc/self/task");
  return static_cast<size_t>(std::distance(begin(threads), end(threads)));
}

std::unique_ptr<Stream> Start(const std::shared_ptr<ShardSet>& shards, const Job& job,
                              const std::shared_ptr<Ring>& ring, size_t threads, int64_t first = 0) {
  return std::make_unique<Stream>(shards, job.plan, ring, threads, first);
}

// One consumer, which holds some batches and scribbles over some.
void CheckOneConsumer(Random& random) {
  for (int round = 0; round < 60; ++round) {
    const bool wide = OneIn(random, 5);
    const Floats floats = OneIn(random, 3) ? Floats::kAny : Floats::kModest;
    const DataSet data(random, wide, floats);
    const auto slots = static_cast<size_t>(Pick(random, 1, 5));
    Job job(random, data, slots, floats);
    const std::shared_ptr<Ring> ring = job.MakeRing();
    const int64_t first = OneIn(random, 3) ? Pick(random, 0, job.batches()) : 0;
    const auto stream = Start(data.Open(OneIn(random, 2)), job, ring, random() % 5, first);
    std::deque<std::pair<size_t, int64_t>> held;
    for (int64_t batch = first; batch < job.batches(); ++batch) {
      const Stream::Result result = Await(*stream);
      CHECK(result.state == State::kBatch && result.batch == batch);
      CHECK(job.IsRight(ring->slot(result.slot), batch));
      held.emplace_back(result.slot, batch);
      while (held.size() == slots || (!held.empty() && OneIn(random, 2))) {
        const auto [slot, its] = held.front();
        held.pop_front();
        CHECK(job.IsRight(ring->slot(slot), its));  // nobody wrote there in the meantime
        const bool touched = OneIn(random, 3);
        if (touched) std::memset(ring->slot(slot), 0xDD, job.slot_bytes);
        ring->Release(slot, touched);
      }
    }
    CHECK(Await(*stream).state == State::kEnd);
    CHECK(Await(*stream).state == State::kEnd);
    if (OneIn(random, 2)) stream->Close();
    for (const auto& [slot, batch] : held) CHECK(job.IsRight(ring->slot(slot), batch));
  }
}

// Several consumers, some of which are cut off by an early Close: every batch at most once, and all of them
// where nobody closes.
void CheckManyConsumers(Random& random) {
  for (int round = 0; round < 40; ++round) {
    const DataSet data(random, OneIn(random, 3), Floats::kModest);
    Job job(random, data, static_cast<size_t>(Pick(random, 1, 5)), Floats::kModest);
    const std::shared_ptr<Ring> ring = job.MakeRing();
    const bool closes = OneIn(random, 2);
    const auto stream = Start(data.Open(OneIn(random, 2)), job, ring, random() % 5);
    std::mutex mutex;
    std::set<int64_t> seen;
    std::vector<std::thread> consumers;
    for (int64_t c = Pick(random, 2, 4); c > 0; --c) {
      consumers.emplace_back([&, own = Random(random())]() mutable {
        try {
          for (;;) {
            const Stream::Result result = Await(*stream);
            if (result.state == State::kEnd) return;
            CHECK(job.IsRight(ring->slot(result.slot), result.batch));
            {
              const std::lock_guard<std::mutex> lock(mutex);
              CHECK(seen.insert(result.batch).second);
            }
            const bool touched = OneIn(own, 2);
            if (touched) std::memset(ring->slot(result.slot), 0xDD, job.slot_bytes);
            ring->Release(result.slot, touched);
          }
        } catch (const ReadError& error) {
          CHECK(closes && error.kind() == ReadError::Kind::kClosed);
        }
      });
    }
    if (closes) {
      std::this_thread::sleep_for(std::chrono::microseconds(Pick(random, 0, 3000)));
      stream->Close();
    }
    for (std::thread& consumer : consumers) consumer.join();
    if (!closes) CHECK(static_cast<int64_t>(seen.size()) == job.batches());
  }
}

// What a consumer holds stays whole, and can be given back, when the stream is gone.
void CheckEarlyEnds(Random& random) {
  for (int round = 0; round < 60; ++round) {
    const DataSet data(random, OneIn(random, 4), Floats::kModest);
    const auto slots = static_cast<size_t>(Pick(random, 1, 5));
    Job job(random, data, slots, Floats::kModest);
    const std::shared_ptr<Ring> ring = job.MakeRing();
    auto stream = Start(data.Open(OneIn(random, 2)), job, ring, random() % 5);
    std::vector<std::pair<size_t, int64_t>> held;
    while (held.size() < slots && static_cast<int64_t>(held.size()) < job.batches() && !OneIn(random, 3)) {
      const Stream::Result result = Await(*stream);
      CHECK(result.state == State::kBatch);
      held.emplace_back(result.slot, result.batch);
    }
    if (held.size() == slots && static_cast<int64_t>(slots) < job.batches()) {
      CHECK(stream->Next(1).state == State::kStarved);
    }
    if (OneIn(random, 2)) {
      stream->Close();
      stream->Close();
      const auto error = Failure(*stream, *ring);
      CHECK(error && error->kind() == ReadError::Kind::kClosed);
    }
    stream.reset();
    for (const auto& [slot, batch] : held) {
      CHECK(job.IsRight(ring->slot(slot), batch));
      ring->Release(slot, OneIn(random, 2));
    }
  }
}

// A slot goes through batches of several streams; what one of them knew of its padding, or left half done,
// misleads none.
void CheckReuse(Random& random) {
  const DataSet data(random, false, Floats::kModest);
  Job job(random, data, 2, Floats::kModest);
  const std::shared_ptr<Ring> ring = job.MakeRing();
  const std::shared_ptr<ShardSet> shards = data.Open(false);
  for (int round = 0; round < 30; ++round) {
    const auto stream = Start(shards, job, ring, random() % 3);
    for (int64_t batch = 0; batch < job.batches() && !OneIn(random, 6); ++batch) {
      const Stream::Result result = Await(*stream);
      CHECK(result.state == State::kBatch && job.IsRight(ring->slot(result.slot), result.batch));
      const bool touched = OneIn(random, 3);
      if (touched) std::memset(ring->slot(result.slot), 0xDD, job.slot_bytes);
      ring->Release(result.slot, touched);
    }
  }
}

// Opened and dropped a thousand times: no thread and no file is left (memory: the leak sanitizer).
void CheckNoGrowth(Random& random) {
  const DataSet data(random, false, Floats::kModest);
  Job job(random, data, 3, Floats::kModest);
  const size_t files = OpenFiles();
  const size_t threads = Threads();
  for (int round = 0; round < 1000; ++round) {
    const std::shared_ptr<Ring> ring = job.MakeRing();
    const auto stream = Start(data.Open(round % 2 == 0), job, ring, static_cast<size_t>(round % 4));
    if (round % 3 == 0) continue;
    const Stream::Result result = Await(*stream);
    if (round % 3 == 1 && result.state == State::kBatch) ring->Release(result.slot, false);
  }
  CHECK(OpenFiles() == files);
  // A joined thread stands in /proc until the kernel has cleared it away.
  for (int tries = 0; Threads() != threads; ++tries) {
    CHECK(tries < 1000);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

void CheckStreams(Random& random) {
  CheckOneConsumer(random);
  CheckManyConsumers(random);
  CheckEarlyEnds(random);
  CheckReuse(random);
  CheckNoGrowth(random);
}

}  // namespace attr_engine::test
