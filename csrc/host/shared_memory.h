// The shared memory of one thread block, with a shadow cell per two bytes that knows who wrote it and who read it.
//
// A race is judged by happens-before, not by the order in which the fibers happened to run: every thread counts the
// barriers it has passed, and an access is ordered after another only if a barrier between the two joined both threads.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cnk::host {

// Vector clocks of the threads of one cluster (one block, where there is no cluster). What every thread of a block has
// seen since its last block-wide barrier is kept once per block; only narrower barriers need a row per thread.
class Clocks {
 public:
  Clocks(int blocks, int threads_per_block)
      : threads_(threads_per_block),
        own_(blocks * threads_per_block, 1),
        block_seen_(blocks, std::vector<uint32_t>(own_.size(), 0)),
        seen_(own_.size()) {}

  uint32_t now(int thread) const { return own_[thread]; }

  // Has `observer` passed a barrier after `thread` stood at `clock`?
  bool ordered(int observer, int thread, uint32_t clock) const {
    if (observer == thread || clock <= block_seen_[observer / threads_][thread]) return true;
    return !seen_[observer].empty() && clock <= seen_[observer][thread];
  }

  void synchronise_cluster() {
    for (auto& row : block_seen_) row = own_;
    for (auto& clock : own_) ++clock;
  }

  void synchronise_block(int block) {
    std::vector<uint32_t>& row = block_seen_[block];
    for (int thread = block * threads_; thread < (block + 1) * threads_; ++thread) {
      merge(row, seen_[thread]);
      row[thread] = own_[thread]++;
    }
  }

  void synchronise(const std::vector<int>& members) {
    std::vector<uint32_t> row(own_.size(), 0);
    for (int thread : members) {
      merge(row, seen_[thread]);
      row[thread] = own_[thread]++;
    }
    for (int thread : members) {
      seen_[thread].resize(row.size(), 0);
      merge(seen_[thread], row);
    }
  }

 private:
  static void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
  }

  int threads_;
  std::vector<uint32_t> own_;                      // [threads]
  std::vector<std::vector<uint32_t>> block_seen_;  // [blocks][threads]
  std::vector<std::vector<uint32_t>> seen_;        // [threads][threads], a row is empty until a narrow barrier
};

class SharedMemory {
 public:
  static constexpr size_t kCellBytes = 2;

  enum class Verdict { fine, uninitialised, in_flight, read_after_write, write_after_write, write_after_read };
  struct Finding {
    Verdict verdict = Verdict::fine;
    int other = -1;  // the thread on the other side of a race
  };

  explicit SharedMemory(size_t bytes) : bytes_(bytes), cells_((bytes + kCellBytes - 1) / kCellBytes) {}

  size_t size() const { return bytes_.size(); }
  std::byte* data(size_t offset) { return bytes_.data() + offset; }

  Finding read(size_t offset, size_t size, int thread, const Clocks& clocks) {
    for (size_t i = offset / kCellBytes; i * kCellBytes < offset + size; ++i) {
      Cell& cell = cells_[i];
      if (cell.in_flight) return {Verdict::in_flight, cell.writer};
      if (!cell.written) return {Verdict::uninitialised, -1};
      if (!clocks.ordered(thread, cell.writer, cell.write_clock)) return {Verdict::read_after_write, cell.writer};
      note_reader(cell, thread, clocks.now(thread));
    }
    return {};
  }

  // `in_flight`: an asynchronous copy whose bytes arrive only when its thread waits for them.
  Finding write(size_t offset, size_t size, int thread, const Clocks& clocks, bool in_flight = false) {
    for (size_t i = offset / kCellBytes; i * kCellBytes < offset + size; ++i) {
      Cell& cell = cells_[i];
      if (cell.in_flight) return {Verdict::in_flight, cell.writer};
      if (cell.written && !clocks.ordered(thread, cell.writer, cell.write_clock))
        return {Verdict::write_after_write, cell.writer};
      for (const Reader& reader : cell.readers)
        if (reader.clock && !clocks.ordered(thread, reader.thread, reader.clock))
          return {Verdict::write_after_read, reader.thread};
      cell = Cell{};
      cell.writer = static_cast<uint16_t>(thread);
      cell.write_clock = clocks.now(thread);
      cell.written = true;
      cell.in_flight = in_flight;
    }
    return {};
  }

  // An asynchronous copy has arrived: from here on it counts as a write of its thread at this clock.
  void land(size_t offset, size_t size, uint32_t clock) {
    for (size_t i = offset / kCellBytes; i * kCellBytes < offset + size; ++i) {
      cells_[i].in_flight = false;
      cells_[i].write_clock = clock;
    }
  }

 private:
  struct Reader {
    uint32_t clock = 0;
    uint16_t thread = 0;
  };
  // Two distinct readers are remembered: whoever overwrites the cell, at least one of them is another thread.
  struct Cell {
    uint32_t write_clock = 0;
    uint16_t writer = 0;
    bool written = false;
    bool in_flight = false;
    Reader readers[2];
  };

  static void note_reader(Cell& cell, int thread, uint32_t clock) {
    Reader& latest = cell.readers[0];
    if (latest.clock && latest.thread != thread) cell.readers[1] = latest;
    latest = {clock, static_cast<uint16_t>(thread)};
  }

  std::vector<std::byte> bytes_;
  std::vector<Cell> cells_;
};

}  // namespace cnk::host
