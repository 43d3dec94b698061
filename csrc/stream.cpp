#include "stream.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "header.h"

namespace attr_engine {
namespace {

using Kind = ReadError::Kind;

// A thread takes tracks of about this many bytes at a time.
constexpr int64_t kUnit = int64_t{512} * 1024;
constexpr size_t kMaxThreads = 256;
constexpr int64_t kNone = ReadError::kNone;

std::string Text(int64_t number) { return std::to_string(number); }

// About so many bytes of padding to copy from, in whole rows: the pattern starts anew with each copy.
constexpr size_t kPadBlock = 8192;

std::vector<uint8_t> PadBlock(const std::vector<uint8_t>& pad_row) {
  std::vector<uint8_t> block;
  if (pad_row.empty()) block.resize(kPadBlock, 0);  // zeros have no rows
  while (block.size() + pad_row.size() <= kPadBlock && !pad_row.empty()) {
    block.insert(block.end(), pad_row.begin(), pad_row.end());
  }
  return block.empty() ? pad_row : block;
}

}  // namespace

Ring::Ring(uint8_t* memory, size_t memory_bytes, size_t slot_bytes)
    : memory_(memory), slot_bytes_(slot_bytes) {
  if (slot_bytes == 0 || memory_bytes / slot_bytes == 0 || memory_bytes % slot_bytes != 0) {
    Refuse("the ring has " + std::to_string(memory_bytes) + " bytes, which are not whole slots of " +
           std::to_string(slot_bytes));
  }
  slots_.resize(memory_bytes / slot_bytes);
  for (size_t i = slots_.size(); i-- > 0;) free_.push_back(i);
}

void Ring::Release(size_t index, bool touched) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (touched) slots_[index].known = false;
  free_.push_back(index);
  freed_.notify_one();
}

Stream::Stream(std::shared_ptr<ShardSet> shards, Plan plan, std::shared_ptr<Ring> ring, size_t threads,
               int64_t first)
    : shards_(std::move(shards)),
      plan_(std::move(plan)),
      ring_(std::move(ring)),
      next_(first),
      limit_(static_cast<int64_t>(plan_.ends.size())) {
  CheckPlan();
  if (threads > kMaxThreads) Refuse(std::to_string(threads) + " threads are too many");
  if (first < 0 || first > limit_) Refuse("the first batch is " + Text(first) + " of " + Text(limit_));
  int64_t payload = 0;
  for (const Field& field : plan_.fields) {
    pad_blocks_.push_back(PadBlock(field.pad_row));
    const int64_t row = RowIn(shards_->tensors()[field.tensor]);
    for (const int64_t rows : field.rows) {
      payload += std::min(rows * row, kUnit);  // no sum of 2^40 of these overflows
    }
  }
  const auto tracks = static_cast<int64_t>(plan_.shards.size());
  if (tracks > 0) unit_tracks_ = std::max<int64_t>(1, kUnit / std::max<int64_t>(1, payload / tracks));

  sigset_t all;
  sigset_t before;
  sigfillset(&all);  // signals are for the threads that the program knows of
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    Close();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Stream::~Stream() { Close(); }

// Afterwards no offset that is computed from the plan can overflow, and none leaves its slot. What lies in
// the files is checked against them when they are opened.
void Stream::CheckPlan() const {
  const size_t tracks = plan_.shards.size();
  const size_t batches = plan_.ends.size();
  int64_t before = 0;
  for (const int64_t end : plan_.ends) {
    if (end <= before) Refuse("a batch of the plan is empty");
    before = end;
  }
  if (static_cast<size_t>(before) != tracks) {
    Refuse("the batches end at track " + Text(before) + " of " + std::to_string(tracks));
  }
  for (size_t i = 0; i < tracks; ++i) {
    const int32_t shard = plan_.shards[i];
    if (shard < 0 || static_cast<size_t>(shard) >= shards_->size()) {
      Refuse("there is no shard " + Text(shard), static_cast<int64_t>(i));
    }
  }
  for (const Field& field : plan_.fields) {
    if (field.tensor >= shards_->tensors().size()) {
      Refuse("there is no tensor " + std::to_string(field.tensor));
    }
    const TensorSpec& tensor = shards_->tensors()[field.tensor];
    const bool is_float = FloatType(tensor.dtype).has_value();
    if ((field.to || field.refuse_nonfinite) && !is_float) {
      Refuse("'" + tensor.name + "' is " + tensor.dtype + ", which is neither cast nor searched for NaN");
    }
    if (field.starts.size() != tracks || field.rows.size() != tracks || field.frames.size() != batches ||
        (!field.checksums.empty() && field.checksums.size() != tracks)) {
      Refuse("the lists of '" + tensor.name + "' do not have one entry a track and a batch");
    }
    int64_t row = 0;
    int64_t row_out = 0;
    if (__builtin_mul_overflow(tensor.row_items, ItemBytes(tensor.dtype), &row) ||
        __builtin_mul_overflow(tensor.row_items,
                               field.to ? static_cast<int64_t>(SizeOf(*field.to)) : ItemBytes(tensor.dtype),
                               &row_out)) {
      Refuse("a row of '" + tensor.name + "' does not fit in 64 bits");
    }
    if (!field.pad_row.empty() && field.pad_row.size() != static_cast<size_t>(row_out)) {
      Refuse("the padding of '" + tensor.name + "' has " + std::to_string(field.pad_row.size()) +
             " bytes, a row has " + Text(row_out));
    }
    if (field.slot_offset > ring_->slot_bytes()) Refuse("'" + tensor.name + "' starts outside its slot");
    const size_t room = ring_->slot_bytes() - field.slot_offset;
    int64_t first = 0;
    for (size_t b = 0; b < batches; ++b) {
      int64_t bytes = 0;
      if (field.frames[b] < 0 || __builtin_mul_overflow(field.frames[b], row_out, &bytes) ||
          __builtin_mul_overflow(plan_.ends[b] - first, bytes, &bytes) || static_cast<size_t>(bytes) > room) {
        Refuse("batch " + std::to_string(b) + " of '" + tensor.name + "' does not fit into its slot");
      }
      for (int64_t i = first; i < plan_.ends[b]; ++i) {
        const auto track = static_cast<size_t>(i);
        const int64_t rows = field.rows[track];
        if (rows < 0 || field.starts[track] < 0) Refuse("its start or its number of rows is negative", i);
        if (rows > field.frames[b]) {
          Refuse("it has " + Text(rows) + " rows but the batch has room for " + Text(field.frames[b]), i);
        }
      }
      first = plan_.ends[b];
    }
  }
}

// Takes the next few tracks, beginning another batch where there is a free slot. Needs the lock.
bool Stream::Claim(Unit& unit) {
  if (in_flight_.empty() || in_flight_.back().begun == in_flight_.back().last) {
    if (next_ >= limit_ || ring_->free_.empty()) return false;
    const size_t slot = ring_->free_.back();
    ring_->free_.pop_back();
    const int64_t first = First(next_);
    const int64_t last = plan_.ends[static_cast<size_t>(next_)];
    in_flight_.push_back({next_, slot, first, last, last - first, nullptr, kNone});
    Ring::Slot& state = ring_->slots_[slot];
    std::vector<int64_t> frames;
    for (const Field& field : plan_.fields) frames.push_back(field.frames[static_cast<size_t>(next_)]);
    if (!state.known || state.frames != frames) {
      // Nothing is known of what lies there, so a track's padding is written to its end.
      state.filled.assign(plan_.fields.size(), {});
      for (size_t f = 0; f < frames.size(); ++f) {
        state.filled[f].assign(static_cast<size_t>(last - first), frames[f]);
      }
      state.frames = frames;
      state.known = true;
    }
    for (size_t f = 0; f < frames.size(); ++f) {
      if (state.filled[f].size() < static_cast<size_t>(last - first)) {
        state.filled[f].resize(static_cast<size_t>(last - first), frames[f]);
      }
    }
    ++next_;
  }
  InFlight& batch = in_flight_.back();
  unit = {batch.batch, batch.slot, batch.begun, std::min(batch.last, batch.begun + unit_tracks_)};
  batch.begun = unit.last;
  return true;
}

// Books a unit as done. Needs the lock.
void Stream::Finish(const Unit& unit, const std::exception_ptr& error, int64_t error_track) {
  InFlight& batch = in_flight_[static_cast<size_t>(unit.batch - in_flight_.front().batch)];
  batch.missing -= unit.last - unit.first;
  if (error) {
    if (!batch.error || error_track < batch.error_track) {
      batch.error = error;
      batch.error_track = error_track;
    }
    ring_->slots_[batch.slot].known = false;
    limit_ = std::min(limit_, unit.batch + 1);
  }
  if (batch.missing == 0) ready_.notify_all();
}

void Stream::Work() {
  Gatherer gatherer(*shards_, plan_);
  for (;;) {
    Unit unit{};
    {
      std::unique_lock<std::mutex> lock(ring_->mutex_);
      while (!stop_ && !Claim(unit)) ring_->freed_.wait(lock);
      if (stop_) return;
      ring_->freed_.notify_one();  // one release can make room for a batch of many units: pass it on
    }
    Run(unit, gatherer);
  }
}

// Reads a unit and books it, whatever happens.
void Stream::Run(const Unit& unit, Gatherer& gatherer) {
  std::exception_ptr error;
  int64_t track = unit.first;
  try {
    ReadUnit(unit, gatherer);
  } catch (...) {
    error = std::current_exception();
    // A unit is read field by field; which track is the first that fails is found one by one.
    try {
      for (; track < unit.last; ++track) ReadUnit({unit.batch, unit.slot, track, track + 1}, gatherer);
      track = unit.first;
    } catch (...) {
      error = std::current_exception();
    }
  }
  const std::lock_guard<std::mutex> lock(ring_->mutex_);
  Finish(unit, error, track);
}

void Stream::ReadUnit(const Unit& unit, Gatherer& gatherer) {
  for (size_t f = 0; f < plan_.fields.size(); ++f) {
    const Field& field = plan_.fields[f];
    const int64_t frames = field.frames[static_cast<size_t>(unit.batch)];
    const int64_t bytes =
        frames * RowOut(shards_->tensors()[field.tensor], field);  // of a track in the batch
    const int64_t before = First(unit.batch);
    uint8_t* const block = ring_->slot(unit.slot) + field.slot_offset;
    for (int64_t track = unit.first; track < unit.last;) {
      const int64_t next = gatherer.Read(field, frames, track, unit.last, block + (track - before) * bytes);
      for (; track < next; ++track) PadTrack(unit, f, track, block + (track - before) * bytes);
    }
  }
}

// Writes what of a track's padding is not known to be there.
void Stream::PadTrack(const Unit& unit, size_t number, int64_t track, uint8_t* out) {
  const Field& field = plan_.fields[number];
  const int64_t row = RowOut(shards_->tensors()[field.tensor], field);
  int64_t& filled = ring_->slots_[unit.slot].filled[number][static_cast<size_t>(track - First(unit.batch))];
  const int64_t valid = field.rows[static_cast<size_t>(track)];
  // Past the caches: nobody reads padding before the batch is delivered.
  const std::vector<uint8_t>& block = pad_blocks_[number];
  const auto end = static_cast<size_t>(filled * row);
  for (auto at = static_cast<size_t>(valid * row); at < end; at += block.size()) {
    CopyNonTemporal(out + at, block.data(), std::min(block.size(), end - at));
  }
  filled = valid;
}

Stream::Result Stream::Next(int64_t milliseconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  Gatherer gatherer(*shards_, plan_);
  std::unique_lock<std::mutex> lock(ring_->mutex_);
  for (;;) {
    if (stop_) throw ReadError(Kind::kClosed, kNone, kNone, "the stream is closed");
    if (in_flight_.empty() && next_ >= limit_) return {State::kEnd, 0, next_};
    if (!in_flight_.empty() && in_flight_.front().missing == 0) {
      const InFlight batch = in_flight_.front();
      if (batch.error) std::rethrow_exception(batch.error);
      in_flight_.pop_front();
      return {State::kBatch, batch.slot, batch.batch};
    }
    Unit unit{};
    if (threads_.empty() && Claim(unit)) {
      ++reading_;
      lock.unlock();
      Run(unit, gatherer);
      lock.lock();
      --reading_;
      if (stop_) ready_.notify_all();
      continue;
    }
    if (std::chrono::steady_clock::now() >= until) {
      return {in_flight_.empty() && ring_->free_.empty() ? State::kStarved : State::kWaiting, 0, next_};
    }
    ready_.wait_until(lock, until);
  }
}

void Stream::Close() {
  const std::lock_guard<std::mutex> one(close_);
  {
    const std::lock_guard<std::mutex> lock(ring_->mutex_);
    stop_ = true;
  }
  ring_->freed_.notify_all();
  ready_.notify_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
  std::unique_lock<std::mutex> lock(ring_->mutex_);
  while (reading_ > 0) ready_.wait(lock);
  for (const InFlight& batch : in_flight_) {
    ring_->slots_[batch.slot].known = false;
    ring_->free_.push_back(batch.slot);
  }
  in_flight_.clear();
}

}  // namespace attr_engine
